/** Everything that the screens show. Values only: `reduce` makes the next one, the store holds the current one. */
package org.cfmoe.app.state

import org.cfmoe.app.benchmark.BenchmarkRow
import org.cfmoe.app.chat.GenerationSettings
import org.cfmoe.app.engine.Device
import org.cfmoe.app.engine.EngineEnd
import org.cfmoe.app.engine.Event
import org.cfmoe.app.engine.Memory
import org.cfmoe.app.engine.Metrics
import org.cfmoe.app.engine.Phase
import org.cfmoe.app.models.ImportProgress
import org.cfmoe.app.models.ModelEntry

enum class Screen { MODELS, CHAT, SETTINGS, PANEL, BENCHMARK }

data class AppState(
    val screen: Screen = Screen.MODELS,
    val models: List<ModelEntry> = emptyList(),
    val importing: ImportState = ImportState.None,
    val engine: EngineState = EngineState.Stopped,
    val chat: ChatState = ChatState(),
    /** By a model's id, where they are not what its authors recommend. */
    val settings: Map<String, GenerationSettings> = emptyMap(),
    val panel: PanelState = PanelState(),
    val benchmark: BenchmarkState = BenchmarkState.Idle,
    val notice: Notice? = null,
)

sealed interface ImportState {
    data object None : ImportState

    /** `bundled`: a model that came with the app is unpacked. */
    data class Running(val bundled: Boolean, val progress: ImportProgress) : ImportState

    data class Failed(val message: String) : ImportState
}

sealed interface EngineState {
    data object Stopped : EngineState

    data class Opening(val model: ModelEntry) : EngineState

    data class Ready(
        val model: ModelEntry,
        val version: String,
        val loaded: Event.Loaded,
        val memory: Memory,
        val devices: List<Device>,
    ) : EngineState

    /** The engine runs, or did, but does not take this model. */
    data class Refused(val model: ModelEntry, val message: String) : EngineState

    data class Died(val model: ModelEntry, val end: EngineEnd) : EngineState
}

/** The model that the engine has, is to have, or had when it ended. */
val EngineState.modelOrNull: ModelEntry?
    get() = when (this) {
        EngineState.Stopped -> null
        is EngineState.Opening -> model
        is EngineState.Ready -> model
        is EngineState.Refused -> model
        is EngineState.Died -> model
    }

/** How answers of `model` are made. */
fun AppState.settingsOf(model: ModelEntry): GenerationSettings = settings[model.id] ?: model.recommended

/** A person's message and the model's answer in turn. `decodedBefore` is what was decoded before the answer that comes. */
data class ChatState(val messages: List<Message> = emptyList(), val answering: Boolean = false, val decodedBefore: Phase? = null)

/** `ending` says why an answer is not complete; `speed`, in tokens/s, is of one that has ended, null where it is too short. */
data class Message(val author: Author, val text: String, val ending: Ending? = null, val speed: Double? = null) {
    enum class Author { PERSON, MODEL }
}

sealed interface Ending {
    data object Cancelled : Ending

    data object Length : Ending

    data object ContextFull : Ending

    /** The message and what was said before it are too long together. */
    data object TooLong : Ending

    data object EngineEnded : Ending

    data class Failed(val message: String) : Ending
}

/**
 * `heat` has a row per MoE layer and a value in [0, 1] per expert: 1 for one that has been in memory all the time lately.
 * `speed` is in tokens/s between the last two reports, null while nothing is decoded.
 */
data class PanelState(
    val metrics: Metrics? = null,
    val residents: List<BooleanArray> = emptyList(),
    val heat: List<FloatArray> = emptyList(),
    val speed: Double? = null,
)

sealed interface BenchmarkState {
    data object Idle : BenchmarkState

    data class Running(val done: Int, val total: Int, val rows: List<BenchmarkRow>) : BenchmarkState

    /** `incomplete` says why rows are missing, in the engine's words or "" where it was cancelled; null: they are all there. */
    data class Finished(val rows: List<BenchmarkRow>, val incomplete: String?) : BenchmarkState
}

/** What is told once, at the foot of the screen. */
sealed interface Notice {
    data class FromEngine(val message: String) : Notice

    /** The system wanted memory back. */
    data class MemoryGivenBack(val budget: Long) : Notice

    data class Imported(val name: String) : Notice

    data object Copied : Notice

    data class Exported(val name: String) : Notice

    data class ExportFailed(val message: String) : Notice

    data class Trouble(val message: String) : Notice
}
