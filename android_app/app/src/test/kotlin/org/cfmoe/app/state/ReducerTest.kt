/** The state's next value, for what can happen. */
package org.cfmoe.app.state

import java.io.File
import org.cfmoe.app.TestMainThread
import org.cfmoe.app.benchmark.BenchmarkPlan
import org.cfmoe.app.benchmark.median
import org.cfmoe.app.chat.GenerationSettings
import org.cfmoe.app.chat.Transcript
import org.cfmoe.app.engine.Device
import org.cfmoe.app.engine.EngineEnd
import org.cfmoe.app.engine.Event
import org.cfmoe.app.engine.FinishReason
import org.cfmoe.app.engine.Memory
import org.cfmoe.app.engine.Metrics
import org.cfmoe.app.engine.ModelInfo
import org.cfmoe.app.engine.Phase
import org.cfmoe.app.engine.Placement
import org.cfmoe.app.models.ModelEntry
import org.cfmoe.app.panel.BudgetScale
import org.junit.Assert.assertEquals
import org.junit.Assert.assertNull
import org.junit.Assert.assertThrows
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

class ReducerTest {
    @get:Rule
    val folder = TemporaryFolder()

    private fun memory(budget: Long) = Memory(budget, 10, 1000, 5, 2, 1, budget - 8, 0, 4, 16, budget + 3, budget + 4)

    private fun phase(tokens: Long, seconds: Double) = Phase(tokens, seconds, tokens / seconds, 3, 1, 0.75, 0, 4096, 1.0)

    private val model = ModelEntry("m-1", "m", File("/models/m-1"), 100, 10, 2, 4, false)
    private val loaded = Event.Loaded(1, ModelInfo(100, 64, 2, 4, 2, 16), memory(500), "direct", "learned", Placement.CPU, "", true, "")
    private val ready = AppState().after(Action.EngineOpening(model), Action.EngineReady(model, "0.1", loaded))
    private val metrics = Metrics(phase(4, 0.5), phase(8, 2.0))

    private fun AppState.after(vararg actions: Action): AppState = actions.fold(this, ::reduce)

    private fun done(reason: FinishReason) = Event.Done(1, reason, 2, 3, "!", 5, metrics, memory(400))

    @Test
    fun answersGrowAndEnd() {
        val growing = ready.after(Action.PromptSent("Say"), Action.TextArrived(" a"), Action.TextArrived(" b"))
        assertTrue(growing.chat.answering)
        assertEquals(listOf("Say", " a b"), growing.chat.messages.map { it.text })
        val ended = growing.after(Action.AnswerEnded(done(FinishReason.CANCELLED)), Action.TextArrived("late"))
        assertEquals(Message(Message.Author.MODEL, " a b!", Ending.Cancelled, 4.0), ended.chat.messages.last())
        assertEquals(400L, (ended.engine as EngineState.Ready).memory.budget)
        assertNull(growing.after(Action.AnswerEnded(done(FinishReason.STOP))).chat.messages.last().ending)
    }

    @Test
    fun endOfTheEngineKeepsWhatWasSaid() {
        val state = ready.after(
            Action.PromptSent("Say"),
            Action.TextArrived(" half"),
            Action.BenchmarkStarted(3),
            Action.EngineEnded(EngineEnd.Killed(9)),
            Action.AnswerFailed(Ending.EngineEnded),
        )
        assertEquals(EngineState.Died(model, EngineEnd.Killed(9)), state.engine)
        assertEquals(Message(Message.Author.MODEL, " half", Ending.EngineEnded), state.chat.messages.last())
        assertEquals(BenchmarkState.Finished(emptyList(), ""), state.benchmark)
        val closed = ready.after(Action.EngineEnded(EngineEnd.Closed))
        assertEquals(EngineState.Stopped, closed.engine)
        val refused = AppState().after(Action.EngineOpening(model), Action.EngineRefused(model, "no"), Action.EngineEnded(EngineEnd.Closed))
        assertEquals(EngineState.Refused(model, "no"), refused.engine)
    }

    @Test
    fun anotherAnswerTakesTheOldOnesPlace() {
        val told = ready.after(Action.PromptSent("Say"), Action.TextArrived(" a"), Action.AnswerEnded(done(FinishReason.LENGTH)))
        assertEquals(4.0, told.chat.messages.last().speed ?: 0.0, 1e-9) // 8 tokens in 2 s
        val again = told.after(Action.AnswerAskedAgain)
        assertEquals(listOf("Say", ""), again.chat.messages.map { it.text })
        assertTrue(again.chat.answering)
        // The engine counts on, or from 0 where it was told everything anew.
        fun ended(decode: Phase): AppState {
            val cancelled = done(FinishReason.CANCELLED).copy(metrics = Metrics(decode, decode))
            return again.after(Action.AnswerEnded(cancelled, stopped = true))
        }
        assertEquals(10.0, ended(phase(18, 3.0)).chat.messages.last().speed ?: 0.0, 1e-9)
        assertEquals(2.0, ended(phase(4, 2.0)).chat.messages.last().speed ?: 0.0, 1e-9)
        // Ended because a text of the template came: neither stopped by the person, nor is there more of it.
        assertEquals(Message(Message.Author.MODEL, "", null, 10.0), ended(phase(18, 3.0)).chat.messages.last())
    }

    @Test
    fun settingsBelongToAModel() {
        val own = GenerationSettings(temperature = 0.3)
        val state = ready.after(Action.SettingsRestored(mapOf("m-2" to own)), Action.SettingsChanged("m-1", own.copy(topK = 7)))
        assertEquals(7, state.settingsOf(model).topK)
        assertEquals(setOf("m-1", "m-2"), state.settings.keys)
        assertEquals(model.recommended, state.after(Action.SettingsChanged("m-1", null)).settingsOf(model))
    }

    @Test
    fun reportsGiveSpeedAndHeat() {
        val busy = ready.after(Action.PromptSent("Say"))
        val first = Event.Report(1, metrics, memory(300), listOf(booleanArrayOf(true, false)))
        val second = first.copy(metrics = Metrics(phase(4, 0.5), phase(18, 3.0)), residents = listOf(booleanArrayOf(true, true)))
        val state = busy.after(Action.Reported(first), Action.Reported(second))
        assertEquals(10.0, state.panel.speed ?: 0.0, 1e-9)
        assertEquals(1f, state.panel.heat[0][0], 1e-6f)
        assertEquals(0.2f, state.panel.heat[0][1], 1e-6f)
        assertEquals(300L, (state.engine as EngineState.Ready).memory.budget)
        // A conversation begun anew counts from 0 again; that is no speed below 0.
        assertTrue((state.after(Action.Reported(first)).panel.speed ?: 1.0) > 0)
        assertEquals(state, state.after(Action.Reported(Event.Report(1, null, null, null))))
    }

    @Test
    fun devicesBelongToARunningEngine() {
        val devices = listOf(Device.CPU, Device("vulkan", "A GPU"))
        assertEquals(devices, (ready.after(Action.DevicesListed(devices)).engine as EngineState.Ready).devices)
        assertEquals(AppState(), AppState().after(Action.DevicesListed(devices)))
    }

    @Test
    fun memoryGivenBackIsTold() {
        val state = ready.after(Action.MemoryGivenBack(memory(10)))
        assertEquals(Notice.MemoryGivenBack(10), state.notice)
        assertNull(state.after(Action.NoticeRead).notice)
    }

    @Test
    fun stateIsWrittenOnTheMainThreadOnly() {
        TestMainThread().use { main ->
            val store = Store(main)
            assertThrows(IllegalStateException::class.java) { store.dispatch(Action.NoticeRead) }
            val seen = ArrayList<Screen>()
            val subscription = main.run { store.subscribe { seen += it.screen } }
            main.run { store.dispatch(Action.ScreenChosen(Screen.PANEL)) }
            main.run { subscription.close() }
            main.run { store.dispatch(Action.ScreenChosen(Screen.CHAT)) }
            assertEquals(listOf(Screen.MODELS, Screen.PANEL), seen)
        }
    }

    @Test
    fun sliderGoesFromWhatWorksToWhatThePhoneHas() {
        val scale = BudgetScale.of(smallest = 100, largest = 1100, budget = 600, resident = 400, available = 5000)
        assertEquals(BudgetScale(100, 1100), scale)
        assertEquals(100L, scale.bytes(0))
        assertEquals(1100L, scale.bytes(BudgetScale.STEPS))
        for (position in 0..BudgetScale.STEPS) assertEquals(position, scale.position(scale.bytes(position)))
        assertEquals(700L, BudgetScale.of(100, 1100, 600, 400, 300).largest)
        assertEquals(600L, BudgetScale.of(100, 1100, 600, 400, 0).largest)
        assertEquals(BudgetScale.STEPS, BudgetScale(7, 7).position(7))
    }

    @Test
    fun conversationOutlastsTheApp() {
        val file = File(folder.root, "conversation.json")
        assertEquals(Transcript(null, emptyList()), Transcript.read(file))
        val transcript = Transcript("m-1", listOf(Message(Message.Author.PERSON, "Säg \"a\"\n"), Message(Message.Author.MODEL, " a")))
        transcript.write(file)
        transcript.write(file)
        assertEquals(transcript, Transcript.read(file))
        for (damage in listOf("", "{", "{}", """{"model": null, "messages": [{"author": "NOBODY", "text": ""}]}""")) {
            file.writeText(damage)
            assertEquals(Transcript(null, emptyList()), Transcript.read(file))
        }
    }

    @Test
    fun benchmarkAlternatesAndTakesMedians() {
        val plan = BenchmarkPlan(listOf(100.0, 25.0), repeats = 2)
        assertEquals(listOf(100.0 to 1, 25.0 to 1, 100.0 to 2, 25.0 to 2), plan.runs)
        assertTrue(plan.prompt(50).all { it in 0 until 50 })
        assertEquals(2.0, median(listOf(9.0, 1.0, 2.0)), 0.0)
        assertEquals(1.5, median(listOf(2.0, 1.0)), 0.0)
    }
}
