/** The engine as a child process: requests to its standard input, events from its standard output, a JSON object a line. */
package org.cfmoe.app.engine

import java.io.ByteArrayOutputStream
import java.io.Closeable
import java.io.File
import java.io.IOException
import java.io.InputStream
import java.util.concurrent.Executor
import java.util.concurrent.ExecutorService
import java.util.concurrent.Executors
import java.util.concurrent.RejectedExecutionException
import java.util.concurrent.TimeUnit
import org.json.JSONObject

/**
 * A crash or a kill of the engine ends this object, never the app. Three threads belong to it, and all of them end with the process:
 * one reads events, one keeps the end of standard error, one writes requests (a pipe may be full, and callers do not wait).
 */
class EngineProcess private constructor(
    private val process: Process,
    private val callbacks: Executor,
    private val observer: EngineObserver,
) : Engine {
    private class Pending(val type: Class<out Event>, val onToken: (Event.Token) -> Unit, val onEnd: (Outcome<Event>) -> Unit)

    private val lock = Any()
    private val pending = LinkedHashMap<Int, Pending>() // guarded by lock, as are the next three
    private var lastId = 0
    private var closing = false
    private var ended = false
    private val lastWords = LastWords()
    private val writer: ExecutorService = Executors.newSingleThreadExecutor { Thread(it, "engine-requests") }
    private val errors = Thread({ lastWords.keep(process.errorStream) }, "engine-errors")
    private val reader = Thread({ read() }, "engine-events")

    override fun devices(reply: (Outcome<Event.Devices>) -> Unit) = send(Wire.operation("devices"), reply)

    override fun load(request: LoadRequest, reply: (Outcome<Event.Loaded>) -> Unit) = send(Wire.load(request), reply)

    override fun generate(request: GenerateRequest, onToken: (Event.Token) -> Unit, reply: (Outcome<Event.Done>) -> Unit) =
        send(Wire.generate(request), reply, onToken)

    override fun cancel() = send<Event.Ok>(Wire.operation("cancel"), {})

    override fun setBudget(budget: Budget, reply: (Outcome<Event.BudgetSet>) -> Unit) = send(Wire.setBudget(budget), reply)

    override fun trim(bytes: Long, reply: (Outcome<Event.BudgetSet>) -> Unit) = send(Wire.trim(bytes), reply)

    override fun metrics(reply: (Outcome<Event.Report>) -> Unit) = send(Wire.operation("metrics"), reply)

    override fun reset(keepExperts: Boolean, reply: (Outcome<Event.Ok>) -> Unit) = send(Wire.reset(keepExperts), reply)

    override fun unload(reply: (Outcome<Event.Ok>) -> Unit) = send(Wire.operation("unload"), reply)

    override fun close() {
        enqueue(Wire.operation("quit"), Pending(Event.Ok::class.java, {}, {}), last = true)
        onWriter {
            closeRequests()
            if (!process.waitFor(GRACE_SECONDS, TimeUnit.SECONDS)) process.destroyForcibly()
        }
    }

    /** Waits until the process is gone and everything that was to be said was handed to the executor; false after `millis`. */
    fun awaitEnd(millis: Long): Boolean {
        reader.join(millis)
        return !reader.isAlive
    }

    /** `reply` gets the last event of the request, which must be a T. */
    private inline fun <reified T : Event> send(
        request: JSONObject,
        noinline reply: (Outcome<T>) -> Unit,
        noinline onToken: (Event.Token) -> Unit = {},
    ) {
        val typed = { outcome: Outcome<Event> ->
            when (outcome) {
                is Outcome.Failure -> reply(outcome)
                is Outcome.Success -> reply(Outcome.Success(outcome.value as T))
            }
        }
        enqueue(request, Pending(T::class.java, onToken, typed))
    }

    private fun enqueue(request: JSONObject, waiting: Pending, last: Boolean = false) {
        val id = synchronized(lock) {
            if (closing || ended) {
                null
            } else {
                closing = last
                lastId += 1
                pending[lastId] = waiting
                lastId
            }
        }
        if (id == null) {
            callbacks.execute { waiting.onEnd(Outcome.Failure(GONE)) }
        } else {
            write(request.put("id", id).toString())
        }
    }

    private fun write(line: String) = onWriter {
        try {
            process.outputStream.write((line + "\n").toByteArray(Charsets.UTF_8))
            process.outputStream.flush()
        } catch (_: IOException) {
            // The process is gone; the reader is about to notice, and answers for every request.
        }
    }

    private fun onWriter(action: () -> Unit) {
        try {
            writer.execute(action)
        } catch (_: RejectedExecutionException) {
            // The reader has ended everything meanwhile, this request too.
        }
    }

    private fun read() {
        var broken: String? = null
        try {
            val lines = LineReader(process.inputStream, MAX_LINE)
            val first = lines.next()
            if (first != null) {
                val greeting = Wire.greeting(first)
                callbacks.execute { observer.onReady(greeting) }
                while (true) deliver(Wire.event(lines.next() ?: break))
            }
        } catch (error: ProtocolException) {
            broken = error.message
        } catch (error: IOException) {
            // A pipe that breaks while the process ends; how it ended is said below.
            if (process.isAlive) broken = "its output cannot be read: ${error.message}"
        }
        end(broken)
    }

    private fun deliver(event: Event) {
        val id = event.id
        val known = synchronized(lock) { if (id == null) null else pending[id] }
        if (id == null || known == null) {
            val detail = if (event is Event.Failed) ": ${event.error.message}" else ""
            throw ProtocolException("the engine answered a request that was not made$detail")
        }
        if (event is Event.Token) {
            callbacks.execute { known.onToken(event) }
            return
        }
        val outcome = when {
            event is Event.Failed -> Outcome.Failure(event.error)
            known.type.isInstance(event) -> Outcome.Success(event)
            else -> throw ProtocolException("${event.javaClass.simpleName} came where ${known.type.simpleName} was to come")
        }
        synchronized(lock) { pending.remove(id) }
        callbacks.execute { known.onEnd(outcome) }
    }

    private fun end(broken: String?) {
        if (broken != null) process.destroyForcibly()
        // Standard output has ended; a process that lives on without it is of no use.
        if (!process.waitFor(GRACE_SECONDS, TimeUnit.SECONDS)) process.destroyForcibly()
        val code = process.waitFor()
        errors.join(ERRORS_MILLIS)
        val (left, wasClosing) = synchronized(lock) {
            ended = true
            val waiting = pending.values.toList()
            pending.clear()
            waiting to closing
        }
        val how = when {
            broken != null -> EngineEnd.Broke(broken)
            wasClosing -> EngineEnd.Closed
            code > SIGNAL_BASE -> EngineEnd.Killed(code - SIGNAL_BASE)
            else -> EngineEnd.Exited(code, lastWords.text())
        }
        writer.shutdown()
        closeRequests()
        closeQuietly(process.inputStream)
        closeQuietly(process.errorStream)
        left.forEach { waiting -> callbacks.execute { waiting.onEnd(Outcome.Failure(GONE)) } }
        callbacks.execute { observer.onEnd(how) }
    }

    /** The end of its input tells the engine to end. */
    private fun closeRequests() = closeQuietly(process.outputStream)

    private fun closeQuietly(stream: Closeable) {
        try {
            stream.close()
        } catch (_: IOException) {
            // Nothing is lost: what could not be flushed has nobody to read it.
        }
    }

    companion object {
        private const val MAX_LINE = 16 shl 20
        private const val GRACE_SECONDS = 5L
        private const val ERRORS_MILLIS = 1000L
        private const val SIGNAL_BASE = 128
        private val GONE = EngineError(EngineError.Kind.ENDED, "the engine has ended")

        /**
         * Starts `command` (the program and what stands before `serve-stdio`). Where that fails `observer` hears of it, and the engine
         * that is returned answers everything with an error.
         */
        fun start(command: List<String>, directory: File?, callbacks: Executor, observer: EngineObserver): Engine {
            val process = try {
                ProcessBuilder(command + "serve-stdio").directory(directory).start()
            } catch (error: IOException) {
                callbacks.execute { observer.onEnd(EngineEnd.NotStarted(error.message ?: command.first())) }
                return NoEngine(callbacks, GONE)
            }
            return EngineProcess(process, callbacks, observer).apply {
                errors.start()
                reader.start()
            }
        }
    }
}

/** Lines of bounded length from a stream. */
internal class LineReader(private val stream: InputStream, private val limit: Int) {
    private val buffer = ByteArray(1 shl 16)
    private var from = 0
    private var to = 0

    /** The next line without its end, or null behind the last; what follows the last line's end is dropped: it is half a line. */
    fun next(): String? {
        val line = ByteArrayOutputStream()
        while (true) {
            for (at in from until to) {
                if (buffer[at] == NEWLINE) {
                    line.write(buffer, from, at - from)
                    from = at + 1
                    return String(line.toByteArray(), Charsets.UTF_8)
                }
            }
            line.write(buffer, from, to - from)
            if (line.size() > limit) throw ProtocolException("a line of more than $limit bytes")
            from = 0
            to = maxOf(stream.read(buffer), 0)
            if (to == 0) return null
        }
    }

    private companion object {
        const val NEWLINE = '\n'.code.toByte()
    }
}

/** The end of what a stream carried. */
private class LastWords {
    private val kept = ByteArray(KEPT)
    private var total = 0L

    fun keep(stream: InputStream) {
        try {
            while (true) {
                val byte = stream.read()
                if (byte < 0) return
                synchronized(this) { kept[(total++ % KEPT).toInt()] = byte.toByte() }
            }
        } catch (_: IOException) {
            // The stream was closed under it, with the process: what was kept stays.
        }
    }

    @Synchronized
    fun text(): String {
        val size = minOf(total, KEPT.toLong()).toInt()
        return String(ByteArray(size) { kept[((total - size + it) % KEPT).toInt()] }, Charsets.UTF_8).trim()
    }

    private companion object {
        const val KEPT = 2048
    }
}

/** Stands for an engine that could not be started. */
private class NoEngine(private val callbacks: Executor, private val error: EngineError) : Engine {
    private fun <T> fail(reply: (Outcome<T>) -> Unit) = callbacks.execute { reply(Outcome.Failure(error)) }

    override fun devices(reply: (Outcome<Event.Devices>) -> Unit) = fail(reply)

    override fun load(request: LoadRequest, reply: (Outcome<Event.Loaded>) -> Unit) = fail(reply)

    override fun generate(request: GenerateRequest, onToken: (Event.Token) -> Unit, reply: (Outcome<Event.Done>) -> Unit) = fail(reply)

    override fun cancel() = Unit

    override fun setBudget(budget: Budget, reply: (Outcome<Event.BudgetSet>) -> Unit) = fail(reply)

    override fun trim(bytes: Long, reply: (Outcome<Event.BudgetSet>) -> Unit) = fail(reply)

    override fun metrics(reply: (Outcome<Event.Report>) -> Unit) = fail(reply)

    override fun reset(keepExperts: Boolean, reply: (Outcome<Event.Ok>) -> Unit) = fail(reply)

    override fun unload(reply: (Outcome<Event.Ok>) -> Unit) = fail(reply)

    override fun close() = Unit
}
