/** The protocol's JSON: requests to lines, lines to events. */
package org.cfmoe.app.engine

import org.json.JSONArray
import org.json.JSONException
import org.json.JSONObject

/** A line from the engine that the protocol does not allow. */
class ProtocolException(message: String, cause: Throwable? = null) : Exception(message, cause)

internal object Wire {
    fun load(request: LoadRequest): JSONObject =
        operation("load")
            .put("artifact", request.artifact)
            .put("prefill_device", request.placement.prefill)
            .put("decode_device", request.placement.decode)
            .putBudget(request.budget)

    fun generate(request: GenerateRequest): JSONObject =
        operation("generate").apply {
            if (request.prompt != null) put("prompt", request.prompt)
            if (request.pieces != null) put("prompt", JSONArray(request.pieces.map(::piece)))
            if (request.tokens != null) put("tokens", JSONArray(request.tokens.toList()))
            put("max_new_tokens", request.maxNewTokens)
            put("temperature", request.temperature)
            put("top_k", request.topK)
            put("top_p", request.topP)
            put("repetition_penalty", request.repetitionPenalty)
            put("seed", request.seed)
            if (request.stopTokens != null) put("stop_tokens", JSONArray(request.stopTokens.toList()))
            if (request.position != null) put("position", request.position)
            if (request.reset) put("reset", true)
        }

    private fun piece(piece: Piece): JSONObject =
        JSONObject().put("text", piece.text).apply { if (piece.typed) put("typed", true) }

    fun setBudget(budget: Budget): JSONObject = operation("set_budget").putBudget(budget)

    fun trim(bytes: Long): JSONObject = operation("trim").put("memory_budget", bytes)

    fun reset(keepExperts: Boolean): JSONObject = operation("reset").apply { if (keepExperts) put("keep_experts", true) }

    fun operation(name: String): JSONObject = JSONObject().put("op", name)

    private fun JSONObject.putBudget(budget: Budget): JSONObject =
        when (budget) {
            is Budget.Bytes -> put("memory_budget", budget.bytes)
            is Budget.Percent -> put("expert_percent", budget.percent)
            Budget.Everything -> this
        }

    /** Raises ProtocolException where `line` is no greeting of this protocol's version. */
    fun greeting(line: String): Greeting =
        parse(line) { json ->
            if (json.getString("event") != "ready") throw ProtocolException("the engine did not greet: ${shown(line)}")
            val protocol = json.getInt("protocol")
            if (protocol != PROTOCOL_VERSION) {
                throw ProtocolException("the engine speaks protocol $protocol, the app $PROTOCOL_VERSION: install both from one build")
            }
            val policies = json.getString("policies").split(',').map { it.trim() }.filter { it.isNotEmpty() }
            Greeting(json.getString("version"), policies)
        }

    /** Raises ProtocolException where `line` is no event of the protocol. Fields that are not known are ignored. */
    fun event(line: String): Event =
        parse(line) { json ->
            val id = if (json.isNull("id")) null else json.get("id") as? Int ?: throw ProtocolException("a strange id: ${shown(line)}")
            when (val name = json.getString("event")) {
                "token" -> Event.Token(id, json.getInt("token"), if (json.has("text")) json.getString("text") else null)
                "done" -> done(id, json)
                "loaded" -> loaded(id, json)
                "budget" -> Event.BudgetSet(id, memory(json.getJSONObject("memory")))
                "metrics" -> report(id, json)
                "devices" -> devices(id, json.getJSONObject("devices"))
                "ok" -> Event.Ok(id)
                "error" -> Event.Failed(id, EngineError(kind(json.getString("kind")), json.getString("message")))
                else -> throw ProtocolException("an unknown event $name")
            }
        }

    private fun done(id: Int?, json: JSONObject) =
        Event.Done(
            id,
            FinishReason.values().find { it.name.lowercase() == json.getString("finish_reason") }
                ?: throw ProtocolException("an unknown finish_reason ${json.getString("finish_reason")}"),
            json.getInt("prompt_tokens"),
            json.getInt("new_tokens"),
            json.optString("text"),
            json.getInt("position"),
            metrics(json.getJSONObject("metrics")),
            memory(json.getJSONObject("memory")),
        )

    private fun loaded(id: Int?, json: JSONObject): Event.Loaded {
        val model = json.getJSONObject("model")
        return Event.Loaded(
            id,
            ModelInfo(
                model.getInt("vocab_size"),
                model.getInt("context_size"),
                model.getInt("moe_layers"),
                model.getInt("num_experts"),
                model.getInt("top_k"),
                model.getLong("expert_record_bytes"),
            ),
            memory(json.getJSONObject("memory")),
            json.getString("io"),
            json.getString("policy"),
            Placement(json.getString("prefill_device"), json.getString("decode_device")),
            json.getString("warning"),
            json.getBoolean("text"),
            json.getString("text_error"),
        )
    }

    private fun devices(id: Int?, json: JSONObject): Event.Devices {
        val gpus = json.keys().asSequence().sorted().mapNotNull { kind ->
            json.getJSONArray(kind).optJSONObject(0)?.let { Device(kind, it.getString("name")) }
        }
        return Event.Devices(id, listOf(Device.CPU) + gpus)
    }

    private fun report(id: Int?, json: JSONObject): Event.Report {
        if (!json.getBoolean("loaded")) return Event.Report(id, null, null, null)
        val rows = json.getJSONArray("residents")
        val residents = (0 until rows.length()).map { row ->
            val flags = rows.getString(row)
            BooleanArray(flags.length) { flags[it] == '1' }
        }
        return Event.Report(id, metrics(json.getJSONObject("metrics")), memory(json.getJSONObject("memory")), residents)
    }

    private fun metrics(json: JSONObject) = Metrics(phase(json.getJSONObject("prefill")), phase(json.getJSONObject("decode")))

    private fun phase(json: JSONObject) =
        Phase(
            json.getLong("tokens"),
            json.getDouble("seconds"),
            json.getDouble("tokens_per_s"),
            json.getLong("hits"),
            json.getLong("misses"),
            json.getDouble("chr"),
            json.getLong("prefetched"),
            json.getLong("bytes_read"),
            json.getDouble("stall_ms"),
        )

    private fun memory(json: JSONObject) =
        Memory(
            json.getLong("budget_bytes"),
            json.getLong("smallest_budget_bytes"),
            json.getLong("largest_budget_bytes"),
            json.getLong("weights_bytes"),
            json.getLong("kv_bytes"),
            json.getLong("workspace_bytes"),
            json.getLong("pool_bytes"),
            json.getLong("arena_bytes"),
            json.getInt("expert_slots"),
            json.getInt("expert_total"),
            json.getLong("rss_bytes"),
            json.getLong("peak_rss_bytes"),
        )

    private fun kind(name: String): EngineError.Kind =
        when (name) {
            "user" -> EngineError.Kind.USER
            "protocol" -> EngineError.Kind.PROTOCOL
            "internal" -> EngineError.Kind.INTERNAL
            else -> throw ProtocolException("an unknown kind of error $name")
        }

    private fun <T> parse(line: String, read: (JSONObject) -> T): T =
        try {
            read(JSONObject(line))
        } catch (error: JSONException) {
            throw ProtocolException("not an event: ${shown(line)} (${error.message})", error)
        }

    private fun shown(line: String): String = if (line.length <= 80) line else line.take(80) + "…"
}
