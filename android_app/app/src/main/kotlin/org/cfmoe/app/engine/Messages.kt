/** What the engine says and is asked, as values; the fields are those of docs/serve-stdio.md. */
package org.cfmoe.app.engine

const val PROTOCOL_VERSION = 1

/** The kind of a device by the name that `load` takes, and what its driver calls it; "" for the CPU. */
data class Device(val kind: String, val name: String) {
    companion object {
        val CPU = Device("cpu", "")
    }
}

/** Which kind of device reads prompts, and which writes. */
data class Placement(val prefill: String, val decode: String) {
    companion object {
        val CPU = Placement(Device.CPU.kind, Device.CPU.kind)

        /** All that can be chosen: one device for both, or a GPU for prompts alone, which many phones are faster with. */
        fun of(devices: List<Device>): List<Placement> {
            val kinds = devices.map { it.kind }
            return kinds.map { Placement(it, it) } + kinds.filter { it != Device.CPU.kind }.map { Placement(it, Device.CPU.kind) }
        }
    }
}

/** The first line of an engine. */
data class Greeting(val version: String, val policies: List<String>)

data class ModelInfo(
    val vocabSize: Int,
    val contextSize: Int,
    val moeLayers: Int,
    val experts: Int,
    val topK: Int,
    val expertRecordBytes: Long,
)

/** Bytes but for the two counts of experts. */
data class Memory(
    val budget: Long,
    val smallestBudget: Long,
    val largestBudget: Long,
    val weights: Long,
    val kv: Long,
    val workspace: Long,
    val pool: Long,
    val arena: Long,
    val expertSlots: Int,
    val expertTotal: Int,
    val resident: Long,
    val peakResident: Long,
)

data class Phase(
    val tokens: Long,
    val seconds: Double,
    val tokensPerSecond: Double,
    val hits: Long,
    val misses: Long,
    val hitRate: Double,
    val prefetched: Long,
    val bytesRead: Long,
    val stallMillis: Double,
)

/** Since the conversation began. */
data class Metrics(val prefill: Phase, val decode: Phase)

/** Why an answer ended. */
enum class FinishReason { STOP, LENGTH, CONTEXT, CANCELLED }

/** What comes back for a request; `id` is the request's, null where the engine could not read it. */
sealed interface Event {
    val id: Int?

    data class Loaded(
        override val id: Int?,
        val model: ModelInfo,
        val memory: Memory,
        val io: String,
        val policy: String,
        val placement: Placement,
        val warning: String,
        val hasText: Boolean,
        val textError: String,
    ) : Event

    /** `text` is null where the engine has no tokenizer, "" while a character is incomplete. */
    data class Token(override val id: Int?, val token: Int, val text: String?) : Event

    data class Done(
        override val id: Int?,
        val reason: FinishReason,
        val promptTokens: Int,
        val newTokens: Int,
        val text: String,
        val position: Int,
        val metrics: Metrics,
        val memory: Memory,
    ) : Event

    data class BudgetSet(override val id: Int?, val memory: Memory) : Event

    /** `residents` has a line per MoE layer with one flag per expert; all but the id is null while nothing is loaded. */
    data class Report(override val id: Int?, val metrics: Metrics?, val memory: Memory?, val residents: List<BooleanArray>?) : Event

    /** The first device of each kind; the CPU comes first. */
    data class Devices(override val id: Int?, val devices: List<Device>) : Event

    data class Ok(override val id: Int?) : Event

    data class Failed(override val id: Int?, val error: EngineError) : Event
}

/** `message` is one line for people, in the engine's own words. */
data class EngineError(val kind: Kind, val message: String) {
    enum class Kind {
        /** The message says what to change. */
        USER,

        /** A request that the engine does not take: a fault of this app. */
        PROTOCOL,

        /** A fault of the engine or the phone. */
        INTERNAL,

        /** The engine ended before it answered. */
        ENDED,
    }
}

sealed interface Outcome<out T> {
    data class Success<T>(val value: T) : Outcome<T>

    data class Failure(val error: EngineError) : Outcome<Nothing>
}

/** How much memory the engine may take, as a person chooses it. */
sealed interface Budget {
    /** Weights, conversation, workspace and experts together. */
    data class Bytes(val bytes: Long) : Budget

    /** The fixed parts and this share of the experts, in (0, 100]. */
    data class Percent(val percent: Double) : Budget

    /** All experts as far as memory goes. */
    data object Everything : Budget
}

data class LoadRequest(val artifact: String, val budget: Budget = Budget.Everything, val placement: Placement = Placement.CPU)

/** A part of a prompt. In what was `typed` special tokens are text. */
data class Piece(val text: String, val typed: Boolean)

/** Exactly one of `prompt`, `pieces` and `tokens`. Temperature 0 is greedy. An empty `stopTokens` means none, null the model's.
 * What follows the first `position` tokens of the conversation is forgotten first. */
data class GenerateRequest(
    val prompt: String? = null,
    val pieces: List<Piece>? = null,
    val tokens: IntArray? = null,
    val maxNewTokens: Int = 256,
    val temperature: Double = 0.0,
    val topK: Int = 0,
    val topP: Double = 1.0,
    val repetitionPenalty: Double = 1.0,
    val seed: Long = 0,
    val stopTokens: IntArray? = null,
    val position: Int? = null,
    val reset: Boolean = false,
)
