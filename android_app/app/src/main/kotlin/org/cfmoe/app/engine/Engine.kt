/** The app's only door to the engine. */
package org.cfmoe.app.engine

/**
 * One running engine. Every method returns at once; answers come on the executor that the engine was made with, in the order in
 * which the engine gave them, and exactly once for each request. After the end every answer is an error of kind ENDED.
 */
interface Engine : AutoCloseable {
    /** What the engine can compute on. */
    fun devices(reply: (Outcome<Event.Devices>) -> Unit)

    fun load(request: LoadRequest, reply: (Outcome<Event.Loaded>) -> Unit)

    /** Continues the conversation. `onToken` comes for each new token, before `reply`. */
    fun generate(request: GenerateRequest, onToken: (Event.Token) -> Unit, reply: (Outcome<Event.Done>) -> Unit)

    /** What was asked to be generated so far ends, with the reason CANCELLED. */
    fun cancel()

    /** Takes effect between two tokens. No token depends on it. */
    fun setBudget(budget: Budget, reply: (Outcome<Event.BudgetSet>) -> Unit)

    /** Gives memory back at once, down to `bytes` or to the smallest budget that works. */
    fun trim(bytes: Long, reply: (Outcome<Event.BudgetSet>) -> Unit)

    fun metrics(reply: (Outcome<Event.Report>) -> Unit)

    /** Forgets the conversation, and unless `keepExperts` the experts that are in memory. */
    fun reset(keepExperts: Boolean = false, reply: (Outcome<Event.Ok>) -> Unit)

    fun unload(reply: (Outcome<Event.Ok>) -> Unit)

    /** Asks the engine to end, and ends it by force where it does not. */
    override fun close()
}

/** Hears of an engine's beginning and end, on the engine's executor. `onEnd` comes once, behind all answers. */
interface EngineObserver {
    fun onReady(greeting: Greeting)

    fun onEnd(end: EngineEnd)
}

/** How Android ends processes to have their memory. */
const val SIGKILL = 9

/** How an engine ended. */
sealed interface EngineEnd {
    /** `close` was called. */
    data object Closed : EngineEnd

    /** By a signal: by SIGKILL from outside, by others for a fault of its own. */
    data class Killed(val signal: Int) : EngineEnd

    /** By itself. `lastWords` is the end of what it wrote on standard error. */
    data class Exited(val code: Int, val lastWords: String) : EngineEnd

    /** It said what the protocol does not allow, and was stopped. */
    data class Broke(val message: String) : EngineEnd

    /** It could not be started. */
    data class NotStarted(val message: String) : EngineEnd
}

fun interface EngineFactory {
    fun start(observer: EngineObserver): Engine
}
