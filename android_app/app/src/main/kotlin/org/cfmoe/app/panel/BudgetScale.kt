/** A slider's positions and the budgets that they stand for. */
package org.cfmoe.app.panel

/** Budgets from `smallest` to `largest` bytes over positions 0 to `STEPS`. */
data class BudgetScale(val smallest: Long, val largest: Long) {
    fun bytes(position: Int): Long = smallest + span * position / STEPS

    /** The nearest position. */
    fun position(bytes: Long): Int =
        if (span == 0L) STEPS else ((bytes.coerceIn(smallest, smallest + span) - smallest) * STEPS / span.toDouble() + 0.5).toInt()

    private val span: Long
        get() = maxOf(largest - smallest, 0)

    companion object {
        const val STEPS = 1000

        /**
         * From what works to what is of use, as far as the phone has it: `available` bytes are free, and the engine already has
         * `resident`. The upper end never lies below `budget`, which is in force.
         */
        fun of(smallest: Long, largest: Long, budget: Long, resident: Long, available: Long): BudgetScale =
            BudgetScale(smallest, maxOf(minOf(largest, resident + available), budget, smallest))
    }
}
