/** Holds the state. One thread writes it, through `reduce`. */
package org.cfmoe.app.state

import java.util.concurrent.Executor

/** Runs things on the thread that owns the state, in order. */
interface MainThread : Executor {
    val isCurrent: Boolean

    fun later(millis: Long, action: () -> Unit)
}

class Store(private val main: MainThread, initial: AppState = AppState()) {
    private val listeners = LinkedHashSet<(AppState) -> Unit>()

    var state: AppState = initial
        private set

    /** On the main thread only. */
    fun dispatch(action: Action) {
        check(main.isCurrent) { "the state is written on the main thread only" }
        state = reduce(state, action)
        listeners.toList().forEach { it(state) }
    }

    /** `listener` hears the current state at once, then every new one. What is returned ends that. */
    fun subscribe(listener: (AppState) -> Unit): AutoCloseable {
        check(main.isCurrent) { "subscribe on the main thread" }
        listeners += listener
        listener(state)
        return AutoCloseable { listeners -= listener }
    }
}
