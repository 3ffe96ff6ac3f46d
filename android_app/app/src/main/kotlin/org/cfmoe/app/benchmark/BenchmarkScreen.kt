/** Measures the open model over budgets, and writes the results to a file that the person names. */
package org.cfmoe.app.benchmark

import android.view.View
import android.widget.Button
import android.widget.ProgressBar
import android.widget.TextView
import org.cfmoe.app.AppController
import org.cfmoe.app.R
import org.cfmoe.app.panel.size
import org.cfmoe.app.setTextIfNew
import org.cfmoe.app.state.AppState
import org.cfmoe.app.state.BenchmarkState
import org.cfmoe.app.state.EngineState
import org.cfmoe.app.state.isBusy

class BenchmarkScreen(root: View, controller: AppController, pickExport: () -> Unit) {
    private val context = root.context
    private val start: Button = root.findViewById(R.id.benchmark_start)
    private val cancel: Button = root.findViewById(R.id.benchmark_cancel)
    private val export: Button = root.findViewById(R.id.benchmark_export)
    private val progress: ProgressBar = root.findViewById(R.id.benchmark_progress)
    private val status: TextView = root.findViewById(R.id.benchmark_status)
    private val table: TextView = root.findViewById(R.id.benchmark_table)
    private val plan = controller.plan

    init {
        start.setOnClickListener { controller.startBenchmark() }
        cancel.setOnClickListener { controller.cancelBenchmark() }
        export.setOnClickListener { pickExport() }
    }

    fun show(state: AppState) {
        val benchmark = state.benchmark
        val running = benchmark as? BenchmarkState.Running
        start.isEnabled = state.engine is EngineState.Ready && !state.isBusy
        cancel.visibility = if (running == null) View.GONE else View.VISIBLE
        progress.visibility = cancel.visibility
        export.isEnabled = benchmark is BenchmarkState.Finished && benchmark.rows.isNotEmpty()
        if (running != null) progress.progress = running.done * progress.max / running.total
        status.setTextIfNew(statusText(state))
        table.setTextIfNew(tableText(rows(benchmark)))
    }

    private fun rows(benchmark: BenchmarkState): List<BenchmarkRow> =
        when (benchmark) {
            BenchmarkState.Idle -> emptyList()
            is BenchmarkState.Running -> benchmark.rows
            is BenchmarkState.Finished -> benchmark.rows
        }

    private fun statusText(state: AppState): String =
        when (val benchmark = state.benchmark) {
            BenchmarkState.Idle -> context.getString(R.string.benchmark_about, plan.promptTokens, plan.newTokens, plan.repeats)
            is BenchmarkState.Running -> context.getString(R.string.benchmark_running, benchmark.done, benchmark.total)
            is BenchmarkState.Finished -> when (benchmark.incomplete) {
                null -> context.getString(R.string.benchmark_done)
                "" -> context.getString(R.string.benchmark_cancelled)
                else -> context.getString(R.string.benchmark_failed, benchmark.incomplete)
            }
        }

    /** A line per budget: the median of its repeats. */
    private fun tableText(rows: List<BenchmarkRow>): String =
        rows.groupBy { it.percent }.map { (percent, same) ->
            context.getString(
                R.string.benchmark_row,
                percent,
                size(context, same.first().memory.budget),
                median(same.map { it.prefill.tokensPerSecond }),
                median(same.map { it.decode.tokensPerSecond }),
                median(same.map { it.decode.hitRate }) * 100,
            )
        }.joinToString("\n")
}

/** The middle value; of an even number of values the mean of the two in the middle. `values` is not empty. */
fun median(values: List<Double>): Double {
    val sorted = values.sorted()
    return (sorted[(sorted.size - 1) / 2] + sorted[sorted.size / 2]) / 2
}
