/** The speed of a model over memory budgets: which runs, in which order, and their results as JSON. */
package org.cfmoe.app.benchmark

import org.cfmoe.app.engine.Budget
import org.cfmoe.app.engine.Engine
import org.cfmoe.app.engine.EngineError
import org.cfmoe.app.engine.Event
import org.cfmoe.app.engine.GenerateRequest
import org.cfmoe.app.engine.Memory
import org.cfmoe.app.engine.ModelInfo
import org.cfmoe.app.engine.Outcome
import org.cfmoe.app.engine.Phase
import org.cfmoe.app.engine.Placement
import org.json.JSONArray
import org.json.JSONObject

/** One measured answer. Speeds are in tokens/s. */
data class BenchmarkRow(val percent: Double, val repeat: Int, val memory: Memory, val prefill: Phase, val decode: Phase)

/** Repeats alternate between the budgets, so that a phone that grows hot slows all of them alike. */
data class BenchmarkPlan(
    val percents: List<Double> = listOf(100.0, 50.0, 25.0),
    val repeats: Int = 3,
    val promptTokens: Int = 64,
    val newTokens: Int = 64,
) {
    val runs: List<Pair<Double, Int>>
        get() = (1..repeats).flatMap { repeat -> percents.map { it to repeat } }

    /** The same tokens on every phone; spread over the vocabulary, so that many experts are asked for. */
    fun prompt(vocabSize: Int): IntArray = IntArray(promptTokens) { ((it + 1) * PRIME % vocabSize).toInt() }

    private companion object {
        const val PRIME = 7919L
    }
}

/** Goes through the plan, then puts the budget back. Lives on the engine's executor. */
class BenchmarkRun(
    private val engine: Engine,
    private val model: ModelInfo,
    private val budgetAfter: Long,
    private val plan: BenchmarkPlan,
    private val onRow: (BenchmarkRow) -> Unit,
    private val onEnd: (incomplete: String?) -> Unit,
) {
    private val left = ArrayDeque(plan.runs)
    private var cancelled = false

    fun start() = next()

    fun cancel() {
        cancelled = true
        engine.cancel()
    }

    private fun next() {
        val run = left.removeFirstOrNull()
        when {
            cancelled -> finish("")
            run == null -> finish(null)
            else -> engine.setBudget(Budget.Percent(run.first)) { set ->
                when (set) {
                    is Outcome.Failure -> finish(set.error.message)
                    is Outcome.Success -> measure(run.first, run.second)
                }
            }
        }
    }

    private fun measure(percent: Double, repeat: Int) {
        if (cancelled) return finish("")
        val request = GenerateRequest(
            tokens = plan.prompt(model.vocabSize),
            maxNewTokens = plan.newTokens,
            stopTokens = IntArray(0),
            reset = true, // each run begins with a cold cache and no conversation
        )
        engine.generate(request, {}) { outcome ->
            when {
                outcome is Outcome.Failure -> finish(outcome.error.message)
                cancelled -> finish("")
                outcome is Outcome.Success -> {
                    onRow(row(percent, repeat, outcome.value))
                    next()
                }
            }
        }
    }

    private fun row(percent: Double, repeat: Int, done: Event.Done) =
        BenchmarkRow(percent, repeat, done.memory, done.metrics.prefill, done.metrics.decode)

    private fun finish(incomplete: String?) {
        left.clear()
        engine.reset { forgotten ->
            engine.setBudget(Budget.Bytes(budgetAfter)) { restored ->
                val failure = (forgotten as? Outcome.Failure ?: restored as? Outcome.Failure)?.error
                onEnd(incomplete ?: failure?.takeIf { it.kind != EngineError.Kind.ENDED }?.message)
            }
        }
    }
}

/** What the export says of where it was measured. */
data class BenchmarkContext(
    val phone: String,
    val system: String,
    val engine: String,
    val model: String,
    val placement: Placement,
    val date: String,
)

/** The rows as JSON: fields as in docs/serve-stdio.md, in bytes, seconds and tokens/s. */
fun benchmarkJson(context: BenchmarkContext, plan: BenchmarkPlan, rows: List<BenchmarkRow>): JSONObject =
    JSONObject()
        .put("format", "cfmoe-app-benchmark")
        .put("format_version", 1)
        .put("phone", context.phone)
        .put("system", context.system)
        .put("engine", context.engine)
        .put("model", context.model)
        .put("prefill_device", context.placement.prefill)
        .put("decode_device", context.placement.decode)
        .put("date", context.date)
        .put("prompt_tokens", plan.promptTokens)
        .put("new_tokens", plan.newTokens)
        .put("results", JSONArray(rows.map(::rowJson)))

private fun rowJson(row: BenchmarkRow): JSONObject =
    JSONObject()
        .put("expert_percent", row.percent)
        .put("repeat", row.repeat)
        .put("budget_bytes", row.memory.budget)
        .put("expert_slots", row.memory.expertSlots)
        .put("expert_total", row.memory.expertTotal)
        .put("rss_bytes", row.memory.resident)
        .put("prefill", phaseJson(row.prefill))
        .put("decode", phaseJson(row.decode))

private fun phaseJson(phase: Phase): JSONObject =
    JSONObject()
        .put("tokens", phase.tokens)
        .put("seconds", phase.seconds)
        .put("tokens_per_s", phase.tokensPerSecond)
        .put("hits", phase.hits)
        .put("misses", phase.misses)
        .put("chr", phase.hitRate)
        .put("prefetched", phase.prefetched)
        .put("bytes_read", phase.bytesRead)
        .put("stall_ms", phase.stallMillis)
