/** The whole app but for its screens: a model that came with it, the real engine, and what befalls both. */
package org.cfmoe.app

import java.io.File
import java.io.IOException
import org.cfmoe.app.benchmark.BenchmarkPlan
import org.cfmoe.app.chat.GenerationSettings
import org.cfmoe.app.engine.Device
import org.cfmoe.app.engine.EngineEnd
import org.cfmoe.app.engine.Placement
import org.cfmoe.app.state.BenchmarkState
import org.cfmoe.app.state.Ending
import org.cfmoe.app.state.EngineState
import org.cfmoe.app.state.Message
import org.cfmoe.app.state.Notice
import org.cfmoe.app.state.Screen
import org.json.JSONObject
import org.junit.After
import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test

class AppControllerTest : AppOnEngine() {
    private fun app(command: List<String> = listOf(Real.engine.path)): AppController =
        start(command, Real.artifact, BenchmarkPlan(listOf(100.0, 25.0), repeats = 1, promptTokens = 8, newTokens = 8))

    /** `longest` in tokens: for what has to happen in mid-answer, more than come before it does. */
    private fun ready(longest: Int = 256): EngineState.Ready {
        eventually("the engine is ready") { state.engine is EngineState.Ready }
        main.run { controller.changeSettings(GenerationSettings(maxNewTokens = longest)) }
        return state.engine as EngineState.Ready
    }

    private fun finished(): Message {
        eventually("the answer has ended") { !state.chat.answering && state.chat.messages.isNotEmpty() }
        return state.chat.messages.last()
    }

    @After
    fun end() {
        main.run { store.state } // what was begun has begun
        children().forEach { it.destroyForcibly() }
        eventually("all engines have ended") { children().isEmpty() && engineThreads().isEmpty() }
        io.shutdownNow()
        main.close()
    }

    @Test
    fun firstStartUnpacksOpensAndTalks() {
        val app = app()
        val ready = ready()
        assertTrue(ready.model.bundled)
        assertEquals(Screen.CHAT, state.screen)
        main.run { app.send("The proposal adds a new") }
        val answer = finished()
        assertEquals(Ending.Length, answer.ending)
        assertTrue(answer.text.isNotBlank())
        eventually("a report came") { state.panel.residents.isNotEmpty() }
        assertEquals(ready.loaded.model.moeLayers, state.panel.heat.size)
        // The same again from the beginning gives the same words.
        main.run { app.forgetConversation() }
        main.run { app.send("The proposal adds a new") }
        assertEquals(answer.text, finished().text)
        main.run { app.close() }
        eventually("the engine is closed") { state.engine == EngineState.Stopped }
    }

    @Test
    fun slidingDuringAnAnswerEndsAtTheLastBudget() {
        val app = app()
        val memory = ready().memory
        main.run { app.send("The proposal adds a new") }
        val steps = 20
        for (step in 0..steps) {
            val bytes = memory.largestBudget - (memory.largestBudget - memory.smallestBudget) * step / steps
            main.run { app.setBudget(bytes) }
        }
        eventually("the smallest budget is in force") { (state.engine as EngineState.Ready).memory.budget == memory.smallestBudget }
        assertEquals(Ending.Length, finished().ending)
        main.run { app.setBudget(memory.largestBudget) }
        eventually("the largest budget is in force") { (state.engine as EngineState.Ready).memory.budget == memory.largestBudget }
        main.run { app.giveMemoryBack() }
        eventually("the memory was given back") { state.notice == Notice.MemoryGivenBack(memory.smallestBudget) }
        main.run { app.inFront() }
        eventually("it is taken again") { (state.engine as EngineState.Ready).memory.budget == memory.largestBudget }
    }

    @Test
    fun engineDiesIsRestartedAndGoesOnWithTheConversation() {
        val app = app()
        ready(longest = 1900)
        main.run { app.send("The proposal adds a new") }
        eventually("words come") { state.chat.messages.last().text.length > 10 }
        children().single().destroyForcibly()
        eventually("the end is told") { state.engine is EngineState.Died }
        assertEquals(EngineEnd.Killed(9), (state.engine as EngineState.Died).end)
        assertEquals(Ending.EngineEnded, finished().ending)
        val half = state.chat.messages
        main.run { app.restart() }
        ready()
        assertEquals(half, state.chat.messages)
        main.run { app.send(" and") }
        assertEquals(Ending.Length, finished().ending)
        // All that was said before was read again: five tokens of the first message, some of the half answer, one of " and".
        val read = checkNotNull(state.panel.metrics).prefill.tokens
        assertTrue("$read", read >= 7)
    }

    @Test
    fun cancelKeepsWhatWasSaid() {
        val app = app()
        ready(longest = 1900)
        main.run { app.send("The proposal adds a new") }
        eventually("words come") { state.chat.messages.last().text.isNotEmpty() }
        main.run { app.cancelAnswer() }
        val answer = finished()
        assertEquals(Ending.Cancelled, answer.ending)
        assertTrue(answer.text.isNotEmpty())
        ready(longest = 16)
        main.run { app.send(" method") }
        assertEquals(Ending.Length, finished().ending)
    }

    @Test
    fun conversationAndModelAreThereAfterTheAppWasEnded() {
        val first = app()
        ready()
        main.run { first.send("The proposal adds a new") }
        finished()
        val said = state.chat.messages
        main.run { first.save() }
        main.run { first.close() }
        eventually("the engine is closed") { state.engine == EngineState.Stopped }
        app()
        ready()
        assertEquals(said.map { it.text }, state.chat.messages.map { it.text })
    }

    @Test
    fun benchmarkMeasuresPutsTheBudgetBackAndIsExported() {
        val app = app()
        val before = ready()
        main.run { app.startBenchmark() }
        eventually("the benchmark is done") { state.benchmark is BenchmarkState.Finished }
        val finished = state.benchmark as BenchmarkState.Finished
        assertEquals(null, finished.incomplete)
        assertEquals(listOf(100.0, 25.0), finished.rows.map { it.percent })
        assertEquals(before.memory.expertTotal / 4, finished.rows[1].memory.expertSlots)
        assertTrue(finished.rows.all { it.decode.tokensPerSecond > 0 })
        assertEquals(before.memory.budget, (state.engine as EngineState.Ready).memory.budget)
        val file = File(folder.root, "export.json")
        main.run { app.exportBenchmark("export.json", "p", "s") { file.outputStream() } }
        eventually("the results are written") { state.notice == Notice.Exported("export.json") }
        val json = JSONObject(file.readText())
        assertEquals("cpu", json.getString("decode_device"))
        assertEquals(before.model.id, json.getString("model"))
        assertEquals(2, json.getJSONArray("results").length())
        assertEquals(finished.rows[1].memory.budget, json.getJSONArray("results").getJSONObject(1).getLong("budget_bytes"))
        main.run { app.exportBenchmark("export.json", "p", "s") { throw IOException("no room") } }
        eventually("what hinders it is told") { state.notice == Notice.ExportFailed("no room") }
        main.run { app.startBenchmark() }
        main.run { app.cancelBenchmark() }
        eventually("the benchmark is cancelled") { (state.benchmark as? BenchmarkState.Finished)?.incomplete == "" }
    }

    @Test
    fun anotherDeviceIsAskedFor() {
        val app = app()
        val ready = ready()
        assertEquals(Placement.CPU, ready.loaded.placement)
        main.run { app.restart(Placement("metal", "cpu")) } // the artifact has no kernels for it
        eventually("the engine says so") { state.engine is EngineState.Refused }
        main.run { app.open(ready.model) }
        ready()
    }

    @Test
    fun driverThatCrashesCostsTheGpuAndNotTheApp() {
        val script = File(folder.root, "crash.sh")
        script.writeText(CRASHES_AT_DEVICES)
        app(listOf("/bin/sh", script.path, script.path + ".log"))
        eventually("it was asked for devices") { "devices" in File(script.path + ".log").let { if (it.exists()) it.readText() else "" } }
        eventually("a second engine runs") { Regex("load").findAll(File(script.path + ".log").readText()).count() == 2 }
        ready()
        assertEquals(listOf(Device.CPU), ready().devices)
        assertEquals(1, Regex("devices").findAll(File(script.path + ".log").readText()).count())
    }

    @Test
    fun modelIsExchangedAndDeleted() {
        val app = app()
        val first = ready().model
        main.run { app.importModel(DirectorySource(Real.artifact)) }
        eventually("the import is done") { state.models.size == 2 }
        assertTrue(state.notice is Notice.Imported)
        val second = state.models.single { !it.bundled }
        main.run { app.open(second) }
        eventually("the other is open") { (state.engine as? EngineState.Ready)?.model == second }
        assertEquals(1, children().size)
        File(first.directory, "weights.bin").delete()
        main.run { app.open(first) }
        eventually("a broken model is refused") { state.engine is EngineState.Refused }
        assertTrue((state.engine as EngineState.Refused).message.isNotBlank())
        main.run { app.delete(second) }
        eventually("it is gone") { state.models.none { it == second } }
    }

    private companion object {
        /** Plays an engine; one that is asked for devices dies as a program does whose driver crashes. */
        val CRASHES_AT_DEVICES = """
            echo '{"event": "ready", "protocol": 1, "version": "0", "abi": 5, "policies": "lru"}'
            while read -r line; do
              case ${'$'}line in
                *'"op":"load"'*)
                  echo load >> "${'$'}1"
                  echo '{"id": 1, "event": "loaded", "io": "direct", "policy": "lru", "prefill_device": "cpu", "decode_device": "cpu",
                    "device_name": "", "warning": "", "text": true, "text_error": "", "model": {"vocab_size": 9, "context_size": 9,
                    "moe_layers": 1, "num_experts": 1, "top_k": 1, "expert_record_bytes": 1}, "memory": {"budget_bytes": 1,
                    "smallest_budget_bytes": 1, "largest_budget_bytes": 1, "weights_bytes": 1, "kv_bytes": 1, "workspace_bytes": 1,
                    "pool_bytes": 1, "arena_bytes": 1, "expert_slots": 1, "expert_total": 1, "rss_bytes": 1, "peak_rss_bytes": 1}}' |
                    tr '\n' ' ' && echo ;;
                *'"op":"metrics"'*) echo '{"id": 2, "event": "metrics", "loaded": false, "rss_bytes": 1}' ;;
                *'"op":"devices"'*) echo devices >> "${'$'}1"; kill -SEGV ${'$'}${'$'} ;;
                *) exit 0 ;;
              esac
            done
        """.trimIndent()
    }
}
