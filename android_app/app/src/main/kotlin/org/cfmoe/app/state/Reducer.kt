/** The only place that makes a new state: a pure function of the old one and what has happened. */
package org.cfmoe.app.state

import org.cfmoe.app.benchmark.BenchmarkRow
import org.cfmoe.app.chat.GenerationSettings
import org.cfmoe.app.engine.Device
import org.cfmoe.app.engine.EngineEnd
import org.cfmoe.app.engine.Event
import org.cfmoe.app.engine.FinishReason
import org.cfmoe.app.engine.Memory
import org.cfmoe.app.models.ImportProgress
import org.cfmoe.app.models.ModelEntry

/** What has happened. */
sealed interface Action {
    data class ScreenChosen(val screen: Screen) : Action

    data class ModelsListed(val models: List<ModelEntry>) : Action

    data class ImportAdvanced(val bundled: Boolean, val progress: ImportProgress) : Action

    data class ImportEnded(val name: String?) : Action

    data class ImportFailed(val message: String) : Action

    data class EngineOpening(val model: ModelEntry) : Action

    data class EngineReady(val model: ModelEntry, val version: String, val loaded: Event.Loaded) : Action

    data class DevicesListed(val devices: List<Device>) : Action

    data class EngineRefused(val model: ModelEntry, val message: String) : Action

    data class EngineEnded(val end: EngineEnd) : Action

    data class ChatRestored(val messages: List<Message>) : Action

    data class PromptSent(val prompt: String) : Action

    /** The last answer is to be made again. */
    data object AnswerAskedAgain : Action

    data class TextArrived(val text: String) : Action

    /** `stopped`: it was ended because it had come to its end. */
    data class AnswerEnded(val done: Event.Done, val stopped: Boolean = false) : Action

    data class AnswerFailed(val ending: Ending) : Action

    data object ConversationForgotten : Action

    data class SettingsRestored(val settings: Map<String, GenerationSettings>) : Action

    /** `settings` null: what the model's authors recommend. */
    data class SettingsChanged(val modelId: String, val settings: GenerationSettings?) : Action

    data class MemoryChanged(val memory: Memory) : Action

    data class MemoryGivenBack(val memory: Memory) : Action

    data class Reported(val report: Event.Report) : Action

    data class BenchmarkStarted(val total: Int) : Action

    data class BenchmarkAdvanced(val row: BenchmarkRow) : Action

    data class BenchmarkEnded(val incomplete: String?) : Action

    data class Told(val notice: Notice) : Action

    data object NoticeRead : Action
}

/** How much of an old heat stays from one report to the next. */
private const val HEAT_KEPT = 0.8f

fun reduce(state: AppState, action: Action): AppState =
    when (action) {
        is Action.ScreenChosen -> state.copy(screen = action.screen)
        is Action.ModelsListed -> state.copy(models = action.models)
        is Action.ImportAdvanced -> state.copy(importing = ImportState.Running(action.bundled, action.progress))
        is Action.ImportEnded ->
            state.copy(importing = ImportState.None, notice = action.name?.let { Notice.Imported(it) } ?: state.notice)
        is Action.ImportFailed -> state.copy(importing = ImportState.Failed(action.message))
        is Action.EngineOpening ->
            state.copy(engine = EngineState.Opening(action.model), panel = PanelState(), benchmark = keptBenchmark(state.benchmark))
        is Action.EngineReady -> {
            val ready = EngineState.Ready(action.model, action.version, action.loaded, action.loaded.memory, listOf(Device.CPU))
            state.copy(engine = ready, notice = action.loaded.warning.ifEmpty { null }?.let { Notice.FromEngine(it) } ?: state.notice)
        }
        is Action.DevicesListed ->
            if (state.engine is EngineState.Ready) state.copy(engine = state.engine.copy(devices = action.devices)) else state
        is Action.EngineRefused -> state.copy(engine = EngineState.Refused(action.model, action.message))
        is Action.EngineEnded -> ended(state, action.end)
        is Action.ChatRestored -> state.copy(chat = ChatState(action.messages))
        is Action.PromptSent -> {
            val added = listOf(Message(Message.Author.PERSON, action.prompt), Message(Message.Author.MODEL, ""))
            state.copy(chat = ChatState(state.chat.messages + added, answering = true, state.panel.metrics?.decode))
        }
        Action.AnswerAskedAgain -> {
            val again = state.chat.messages.dropLast(1) + Message(Message.Author.MODEL, "")
            state.copy(chat = ChatState(again, answering = true, state.panel.metrics?.decode))
        }
        is Action.TextArrived -> state.copy(chat = state.chat.withAnswer { it.copy(text = it.text + action.text) })
        is Action.AnswerEnded -> answered(state, action.done, action.stopped)
        is Action.AnswerFailed -> {
            if (!state.chat.answering) state else state.copy(chat = state.chat.ended(action.ending, ""))
        }
        Action.ConversationForgotten -> state.copy(chat = ChatState(), panel = PanelState())
        is Action.SettingsRestored -> state.copy(settings = action.settings)
        is Action.SettingsChanged -> {
            val others = state.settings - action.modelId
            state.copy(settings = action.settings?.let { others + (action.modelId to it) } ?: others)
        }
        is Action.MemoryChanged -> state.withMemory(action.memory)
        is Action.MemoryGivenBack -> state.withMemory(action.memory).copy(notice = Notice.MemoryGivenBack(action.memory.budget))
        is Action.Reported -> reported(state, action.report)
        is Action.BenchmarkStarted -> state.copy(benchmark = BenchmarkState.Running(0, action.total, emptyList()))
        is Action.BenchmarkAdvanced ->
            when (val running = state.benchmark) {
                is BenchmarkState.Running -> state.copy(benchmark = running.copy(done = running.done + 1, rows = running.rows + action.row))
                else -> state
            }
        is Action.BenchmarkEnded ->
            when (val running = state.benchmark) {
                is BenchmarkState.Running -> state.copy(benchmark = BenchmarkState.Finished(running.rows, action.incomplete))
                else -> state
            }
        is Action.Told -> state.copy(notice = action.notice)
        Action.NoticeRead -> state.copy(notice = null)
    }

private fun keptBenchmark(benchmark: BenchmarkState): BenchmarkState =
    if (benchmark is BenchmarkState.Running) BenchmarkState.Finished(benchmark.rows, "") else benchmark

private fun ended(state: AppState, end: EngineEnd): AppState {
    val model = state.engine.modelOrNull
    val chat = if (state.chat.answering) state.chat.ended(Ending.EngineEnded, "") else state.chat
    // A refusal says more than that the engine was closed after it.
    val engine = when {
        model == null || end == EngineEnd.Closed -> if (state.engine is EngineState.Refused) state.engine else EngineState.Stopped
        else -> EngineState.Died(model, end)
    }
    return state.copy(engine = engine, chat = chat, benchmark = keptBenchmark(state.benchmark), panel = state.panel.copy(speed = null))
}

private fun answered(state: AppState, done: Event.Done, stopped: Boolean): AppState {
    val ending = when {
        stopped || done.reason == FinishReason.STOP -> null
        done.reason == FinishReason.LENGTH -> Ending.Length
        done.reason == FinishReason.CONTEXT -> Ending.ContextFull
        else -> Ending.Cancelled
    }
    val panel = state.panel.copy(metrics = done.metrics, speed = null)
    // The engine counts from 0 again where it was told the conversation anew.
    val before = state.chat.decodedBefore?.takeIf { it.tokens <= done.metrics.decode.tokens }
    val tokens = done.metrics.decode.tokens - (before?.tokens ?: 0)
    val seconds = done.metrics.decode.seconds - (before?.seconds ?: 0.0)
    val speed = if (tokens > 0 && seconds > 0) tokens / seconds else null
    return state.withMemory(done.memory).copy(chat = state.chat.ended(ending, if (stopped) "" else done.text, speed), panel = panel)
}

private fun reported(state: AppState, report: Event.Report): AppState {
    val metrics = report.metrics ?: return state
    val residents = report.residents.orEmpty()
    val before = state.panel
    val heat = residents.mapIndexed { layer, row ->
        val old = before.heat.getOrNull(layer)?.takeIf { it.size == row.size }
        FloatArray(row.size) { expert ->
            val now = if (row[expert]) 1f else 0f
            if (old == null) now else HEAT_KEPT * old[expert] + (1 - HEAT_KEPT) * now
        }
    }
    val earlier = before.metrics?.decode
    val tokens = metrics.decode.tokens - (earlier?.tokens ?: 0)
    val seconds = metrics.decode.seconds - (earlier?.seconds ?: 0.0)
    val speed = if (tokens > 0 && seconds > 0) tokens / seconds else before.speed.takeIf { state.isBusy }
    val panel = PanelState(metrics, residents, heat, speed)
    return (report.memory?.let { state.withMemory(it) } ?: state).copy(panel = panel)
}

/** Whether the engine computes now. */
val AppState.isBusy: Boolean
    get() = chat.answering || benchmark is BenchmarkState.Running

private fun AppState.withMemory(memory: Memory): AppState =
    if (engine is EngineState.Ready) copy(engine = engine.copy(memory = memory)) else this

private fun ChatState.withAnswer(change: (Message) -> Message): ChatState =
    if (!answering) this else copy(messages = messages.dropLast(1) + change(messages.last()))

private fun ChatState.ended(ending: Ending?, text: String, speed: Double? = null): ChatState =
    withAnswer { it.copy(text = it.text + text, ending = ending, speed = speed) }.copy(answering = false)
