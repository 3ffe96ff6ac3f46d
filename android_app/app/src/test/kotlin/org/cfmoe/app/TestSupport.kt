/** What the tests share: a main thread of their own, the real engine and a model, and waiting for answers. */
package org.cfmoe.app

import java.io.File
import java.io.InputStream
import java.util.concurrent.CompletableFuture
import java.util.concurrent.CopyOnWriteArrayList
import java.util.concurrent.ExecutionException
import java.util.concurrent.Executors
import java.util.concurrent.TimeUnit
import org.cfmoe.app.engine.Engine
import org.cfmoe.app.engine.EngineEnd
import org.cfmoe.app.engine.EngineObserver
import org.cfmoe.app.engine.EngineProcess
import org.cfmoe.app.engine.Event
import org.cfmoe.app.engine.Greeting
import org.cfmoe.app.engine.LoadRequest
import org.cfmoe.app.engine.Outcome
import org.cfmoe.app.models.ArtifactSource
import org.cfmoe.app.state.MainThread
import org.junit.Assume.assumeTrue

const val SECONDS = 60L

/** The program and the files that -Dcfmoe.engine, -Dcfmoe.artifact and so on name; tests that need them are left out where they do not. */
object Real {
    val engine: File get() = named("cfmoe.engine")
    val artifact: File get() = named("cfmoe.artifact")

    /** The same model with a chat template. */
    val chat: File get() = named("cfmoe.chat")

    /** Conversations in the words of templates: tests/python/chat_artifact.py. */
    val conversations: File get() = named("cfmoe.conversations")

    private fun named(property: String): File {
        val value = System.getProperty(property)
        assumeTrue("-D$property is not given", value != null)
        return File(value)
    }
}

/** One thread, as Android's main thread is. */
class TestMainThread : MainThread, AutoCloseable {
    private val executor = Executors.newSingleThreadScheduledExecutor { Thread(it, NAME) }

    override val isCurrent: Boolean
        get() = Thread.currentThread().name == NAME

    override fun execute(command: Runnable) = executor.execute(command)

    override fun later(millis: Long, action: () -> Unit) {
        executor.schedule(action, millis, TimeUnit.MILLISECONDS)
    }

    /** Runs `action` on it and returns what comes out. */
    fun <T> run(action: () -> T): T =
        try {
            executor.submit<T>(action).get(SECONDS, TimeUnit.SECONDS)
        } catch (error: ExecutionException) {
            throw error.cause ?: error
        }

    override fun close() {
        executor.shutdownNow()
    }

    private companion object {
        const val NAME = "test-main"
    }
}

/** Hears what an engine's observer hears. */
class Watcher : EngineObserver {
    val greeting = CompletableFuture<Greeting>()
    val end = CompletableFuture<EngineEnd>()
    val log = CopyOnWriteArrayList<String>()

    override fun onReady(greeting: Greeting) {
        log += "ready"
        this.greeting.complete(greeting)
    }

    override fun onEnd(end: EngineEnd) {
        log += "end"
        if (!this.end.complete(end)) throw AssertionError("the end came twice")
    }

    fun awaitEnd(): EngineEnd = end.get(SECONDS, TimeUnit.SECONDS)
}

/** The outcome of one request; a second answer is a failure. */
fun <T> answer(request: ((Outcome<T>) -> Unit) -> Unit): Outcome<T> = later(request).get(SECONDS, TimeUnit.SECONDS)

fun <T> later(request: ((Outcome<T>) -> Unit) -> Unit): CompletableFuture<Outcome<T>> {
    val future = CompletableFuture<Outcome<T>>()
    request { outcome -> if (!future.complete(outcome)) throw AssertionError("a second answer: $outcome") }
    return future
}

fun <T> success(request: ((Outcome<T>) -> Unit) -> Unit): T = value(answer(request))

fun <T> value(outcome: Outcome<T>): T =
    when (outcome) {
        is Outcome.Success -> outcome.value
        is Outcome.Failure -> throw AssertionError(outcome.error)
    }

fun <T> CompletableFuture<Outcome<T>>.await(): T = value(get(SECONDS, TimeUnit.SECONDS))

fun startEngine(main: MainThread, watcher: Watcher, vararg command: String): Engine =
    EngineProcess.start(command.toList(), null, main, watcher)

fun Engine.loadReal(): Event.Loaded = success { load(LoadRequest(Real.artifact.path), it) }

/** The processes that this one has started and that still are there. */
fun children(): List<ProcessHandle> = ProcessHandle.current().children().toList()

/** Threads of engines that still run. */
fun engineThreads(): List<String> = Thread.getAllStackTraces().keys.map { it.name }.filter { it.startsWith("engine-") }

/** A model in a directory. */
class DirectorySource(private val directory: File) : ArtifactSource {
    override val totalBytes: Long = directory.walk().filter { it.isFile }.sumOf { it.length() }

    override fun forEachFile(visit: (path: String, content: InputStream) -> Unit) {
        directory.walk().filter { it.isFile }.sorted().forEach { file ->
            file.inputStream().use { visit(file.relativeTo(directory).invariantSeparatorsPath, it) }
        }
    }
}

/** Waits until `condition` holds. */
fun eventually(what: String, condition: () -> Boolean) {
    val end = System.nanoTime() + TimeUnit.SECONDS.toNanos(SECONDS)
    while (!condition()) {
        if (System.nanoTime() > end) throw AssertionError("not within $SECONDS s: $what")
        Thread.sleep(10)
    }
}
