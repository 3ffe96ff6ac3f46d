/** The client against the real engine, and against programs that only pretend to be one. */
package org.cfmoe.app.engine

import java.io.File
import java.util.concurrent.CopyOnWriteArrayList
import java.util.concurrent.CountDownLatch
import java.util.concurrent.TimeUnit
import org.cfmoe.app.Real
import org.cfmoe.app.SECONDS
import org.cfmoe.app.TestMainThread
import org.cfmoe.app.Watcher
import org.cfmoe.app.answer
import org.cfmoe.app.await
import org.cfmoe.app.children
import org.cfmoe.app.engineThreads
import org.cfmoe.app.eventually
import org.cfmoe.app.later
import org.cfmoe.app.loadReal
import org.cfmoe.app.startEngine
import org.cfmoe.app.success
import org.junit.After
import org.junit.Assert.assertEquals
import org.junit.Assert.assertNotEquals
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

class EngineProcessTest {
    @get:Rule
    val folder = TemporaryFolder()

    private val main = TestMainThread()
    private val watcher = Watcher()

    @After
    fun end() {
        children().forEach { it.destroyForcibly() } // of a test that failed
        eventually("all engines have ended") { children().isEmpty() && engineThreads().isEmpty() }
        main.close()
    }

    private fun real(watcher: Watcher = this.watcher): Engine = startEngine(main, watcher, Real.engine.path)

    private fun Engine.tokens(request: GenerateRequest, onToken: (Int) -> Unit = {}): Pair<List<Event.Token>, Event.Done> {
        val tokens = CopyOnWriteArrayList<Event.Token>()
        val done = success<Event.Done> { reply ->
            generate(request, { token ->
                tokens += token
                onToken(tokens.size)
            }, reply)
        }
        return tokens to done
    }

    @Test
    fun loadsStreamsAndCloses() {
        val engine = real()
        val loaded = engine.loadReal()
        assertTrue(loaded.hasText)
        assertEquals(loaded.memory.largestBudget, loaded.memory.budget)
        assertEquals(Device.CPU, success { engine.devices(it) }.devices.first())
        assertEquals(Placement.CPU, loaded.placement)
        val (tokens, done) = engine.tokens(PROMPT)
        assertEquals(PROMPT.maxNewTokens, tokens.size)
        assertEquals(tokens.size, done.newTokens)
        assertEquals(FinishReason.LENGTH, done.reason)
        assertTrue(tokens.joinToString("") { it.text.orEmpty() }.isNotBlank())
        assertEquals((tokens.size - 1).toLong(), done.metrics.decode.tokens)
        val report = success { engine.metrics(it) }
        assertEquals(loaded.model.moeLayers, report.residents?.size)
        assertEquals(loaded.model.experts, report.residents?.first()?.size)
        val (again, _) = engine.tokens(PROMPT)
        assertEquals(tokens, again.map { it.copy(id = tokens.first().id) })
        engine.close()
        assertEquals(EngineEnd.Closed, watcher.awaitEnd())
        assertEquals(listOf("ready", "end"), watcher.log)
    }

    @Test
    fun budgetMovesWhileTokensComeAndChangesNone() {
        val engine = real()
        val loaded = engine.loadReal()
        val long = PROMPT.copy(maxNewTokens = 1500)
        val (expected, _) = engine.tokens(long)
        val asked = listOf(Budget.Percent(25.0), Budget.Bytes(loaded.memory.smallestBudget), Budget.Percent(75.0))
        val slots = CopyOnWriteArrayList<Int>()

        // Each is asked for when the one before is in force; the answer is cut off behind the last.
        fun next() {
            engine.setBudget(asked[slots.size]) { outcome ->
                slots += (outcome as Outcome.Success).value.memory.expertSlots
                if (slots.size < asked.size) next() else engine.cancel()
            }
        }
        val (tokens, done) = engine.tokens(long) { count -> if (count == 1) next() }
        assertEquals(FinishReason.CANCELLED, done.reason)
        assertEquals(expected.take(tokens.size).map { it.token }, tokens.map { it.token })
        assertEquals(loaded.memory.expertTotal / 4, slots[0])
        assertTrue("$slots", slots[1] < slots[0] && slots[0] < slots[2])
        assertEquals(slots[2], done.memory.expertSlots)
        val trimmed = success { engine.trim(0, it) }
        assertEquals(loaded.memory.smallestBudget, trimmed.memory.budget)
        val refused = answer { engine.setBudget(Budget.Bytes(1), it) } as Outcome.Failure
        assertEquals(EngineError.Kind.USER, refused.error.kind)
        assertTrue(refused.error.message, refused.error.message.isNotBlank())
        engine.close()
        watcher.awaitEnd()
    }

    @Test
    fun cancelEndsAnAnswerAndNotTheEngine() {
        val engine = real()
        engine.loadReal()
        val (tokens, done) = engine.tokens(PROMPT.copy(maxNewTokens = 1500)) { count -> if (count == 5) engine.cancel() }
        assertEquals(FinishReason.CANCELLED, done.reason)
        assertTrue("${tokens.size}", tokens.size < 1500)
        assertEquals(tokens.size, done.newTokens)
        val (whole, after) = engine.tokens(PROMPT)
        assertEquals(FinishReason.LENGTH, after.reason)
        assertEquals(tokens.take(5).map { it.token }, whole.take(5).map { it.token })
        engine.close()
        watcher.awaitEnd()
    }

    @Test
    fun killInMidAnswerIsToldAndAnotherEngineTakesOver() {
        val engine = real()
        engine.loadReal()
        val started = CountDownLatch(3)
        val answer = later<Event.Done> { engine.generate(PROMPT.copy(maxNewTokens = 1500), { started.countDown() }, it) }
        assertTrue(started.await(SECONDS, TimeUnit.SECONDS))
        val queued = later<Event.Ok> { engine.reset(reply = it) }
        children().single().destroyForcibly()
        for (outcome in listOf(answer, queued)) {
            val failure = outcome.get(SECONDS, TimeUnit.SECONDS) as Outcome.Failure
            assertEquals(EngineError.Kind.ENDED, failure.error.kind)
        }
        assertEquals(EngineEnd.Killed(9), watcher.awaitEnd())
        val late = answer { engine.metrics(it) } as Outcome.Failure
        assertEquals(EngineError.Kind.ENDED, late.error.kind)
        engine.close()
        val second = Watcher()
        val next = real(second)
        next.loadReal()
        assertEquals(PROMPT.maxNewTokens, next.tokens(PROMPT).first.size)
        next.close()
        assertEquals(EngineEnd.Closed, second.awaitEnd())
    }

    @Test
    fun closeInMidAnswerEndsIt() {
        val engine = real()
        engine.loadReal()
        val started = CountDownLatch(1)
        val answer = later<Event.Done> { engine.generate(PROMPT.copy(maxNewTokens = 1500), { started.countDown() }, it) }
        assertTrue(started.await(SECONDS, TimeUnit.SECONDS))
        engine.close()
        assertEquals(FinishReason.CANCELLED, answer.await().reason)
        assertEquals(EngineEnd.Closed, watcher.awaitEnd())
    }

    @Test
    fun whatCannotBeLoadedIsRefusedInWords() {
        val engine = real()
        val missing = File(folder.root, "nothing")
        val refused = answer { engine.load(LoadRequest(missing.path), it) } as Outcome.Failure
        assertEquals(EngineError.Kind.USER, refused.error.kind)
        assertTrue(refused.error.message, missing.path in refused.error.message)
        val unloaded = answer { engine.generate(PROMPT, {}, it) } as Outcome.Failure
        assertEquals(EngineError.Kind.USER, unloaded.error.kind)
        engine.loadReal()
        engine.close()
        watcher.awaitEnd()
    }

    @Test
    fun hundredEnginesLeaveNothing() {
        fun cycle() {
            val each = Watcher()
            val engine = real(each)
            engine.loadReal()
            assertEquals(1, engine.tokens(PROMPT.copy(maxNewTokens = 1)).first.size)
            engine.close()
            assertEquals(EngineEnd.Closed, each.awaitEnd())
            assertTrue((engine as EngineProcess).awaitEnd(SECONDS * 1000))
        }
        repeat(3) { cycle() }
        val before = descriptors()
        repeat(100) { cycle() }
        eventually("threads have ended") { engineThreads().isEmpty() }
        assertEquals(before, descriptors())
        assertTrue(children().isEmpty())
    }

    private fun descriptors(): Int = checkNotNull(File("/proc/self/fd").list()).size

    // Programs that only pretend.

    private fun fake(script: String): Engine {
        val file = folder.newFile()
        file.writeText(script)
        return startEngine(main, watcher, "/bin/sh", file.path)
    }

    private fun brokenBy(line: String): EngineEnd {
        val engine = fake("echo '$READY'\nread request\nprintf '%s\\n' '$line'\nexec sleep 60\n")
        val failure = answer { engine.metrics(it) } as Outcome.Failure
        assertEquals(EngineError.Kind.ENDED, failure.error.kind)
        return watcher.awaitEnd()
    }

    @Test
    fun garbageStopsTheEngine() {
        val end = brokenBy("this is no JSON") as EngineEnd.Broke
        assertTrue(end.message, "this is no JSON" in end.message)
    }

    @Test
    fun answersThatNobodyAskedForStopTheEngine() {
        assertTrue(brokenBy("""{"id": 99, "event": "ok"}""") is EngineEnd.Broke)
    }

    @Test
    fun answersOfAnotherKindStopTheEngine() {
        assertTrue(brokenBy("""{"id": 1, "event": "ok"}""") is EngineEnd.Broke)
    }

    @Test
    fun anotherProtocolStopsTheEngine() {
        fake("echo '${READY.replace("\"protocol\": 1", "\"protocol\": 7")}'\nexec sleep 60\n")
        val end = watcher.awaitEnd() as EngineEnd.Broke
        assertTrue(end.message, "7" in end.message)
    }

    @Test
    fun lineWithoutEndStopsTheEngine() {
        fake("echo '$READY'\nexec cat /dev/zero\n")
        assertTrue(watcher.awaitEnd() is EngineEnd.Broke)
    }

    @Test
    fun lastWordsOfAnEngineAreKept() {
        val engine = fake("echo '$READY'\nread request\nprintf '{\"id\": 1, \"eve'\necho 'no such instruction' >&2\nexit 3\n")
        assertTrue(answer { engine.metrics(it) } is Outcome.Failure)
        assertEquals(EngineEnd.Exited(3, "no such instruction"), watcher.awaitEnd())
        assertNotEquals(emptyList<String>(), watcher.log)
    }

    @Test
    fun engineThatIsNotThereIsTold() {
        val engine = startEngine(main, watcher, File(folder.root, "none").path)
        assertTrue(watcher.awaitEnd() is EngineEnd.NotStarted)
        val failure = answer { engine.metrics(it) } as Outcome.Failure
        assertEquals(EngineError.Kind.ENDED, failure.error.kind)
        engine.close()
    }

    @Test
    fun engineThatWillNotEndIsKilled() {
        val engine = fake("trap '' TERM INT HUP\necho '$READY'\nwhile true; do sleep 1; done\n")
        watcher.greeting.get(SECONDS, TimeUnit.SECONDS)
        engine.close()
        assertEquals(EngineEnd.Closed, watcher.awaitEnd())
    }

    private companion object {
        val PROMPT = GenerateRequest(prompt = "The proposal adds a new", maxNewTokens = 32, stopTokens = IntArray(0), reset = true)
        const val READY = """{"event": "ready", "protocol": 1, "version": "0", "abi": 4, "policies": "lru"}"""
    }
}
