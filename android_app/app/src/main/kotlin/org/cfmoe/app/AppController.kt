/** What the app does: takes a person's wishes, talks to engine and library, and tells the store what has happened. */
package org.cfmoe.app

import java.io.File
import java.io.IOException
import java.io.OutputStream
import java.time.Instant
import java.time.LocalDate
import java.time.temporal.ChronoUnit
import java.util.concurrent.Executor
import java.util.concurrent.atomic.AtomicBoolean
import kotlin.random.Random
import org.cfmoe.app.benchmark.BenchmarkContext
import org.cfmoe.app.benchmark.BenchmarkPlan
import org.cfmoe.app.benchmark.BenchmarkRun
import org.cfmoe.app.benchmark.benchmarkJson
import org.cfmoe.app.chat.ChatFormat
import org.cfmoe.app.chat.EngineContext
import org.cfmoe.app.chat.GenerationSettings
import org.cfmoe.app.chat.SettingField
import org.cfmoe.app.chat.SettingsFile
import org.cfmoe.app.chat.StopText
import org.cfmoe.app.chat.Transcript
import org.cfmoe.app.chat.turns
import org.cfmoe.app.engine.Budget
import org.cfmoe.app.engine.Engine
import org.cfmoe.app.engine.EngineEnd
import org.cfmoe.app.engine.EngineError
import org.cfmoe.app.engine.EngineFactory
import org.cfmoe.app.engine.EngineObserver
import org.cfmoe.app.engine.Event
import org.cfmoe.app.engine.GenerateRequest
import org.cfmoe.app.engine.Greeting
import org.cfmoe.app.engine.LoadRequest
import org.cfmoe.app.engine.Outcome
import org.cfmoe.app.engine.Placement
import org.cfmoe.app.engine.SIGKILL
import org.cfmoe.app.models.ArtifactSource
import org.cfmoe.app.models.ImportCancelled
import org.cfmoe.app.models.Importer
import org.cfmoe.app.models.ModelEntry
import org.cfmoe.app.models.ModelException
import org.cfmoe.app.models.ModelLibrary
import org.cfmoe.app.state.Action
import org.cfmoe.app.state.AppState
import org.cfmoe.app.state.BenchmarkState
import org.cfmoe.app.state.Ending
import org.cfmoe.app.state.EngineState
import org.cfmoe.app.state.ImportState
import org.cfmoe.app.state.MainThread
import org.cfmoe.app.state.Notice
import org.cfmoe.app.state.Screen
import org.cfmoe.app.state.Store
import org.cfmoe.app.state.isBusy
import org.cfmoe.app.state.modelOrNull
import org.cfmoe.app.state.settingsOf

/** A model inside the app: its manifest, and where its files come from. */
data class BundledModel(val manifest: ByteArray, val source: ArtifactSource)

/** All methods on the main thread; what takes long goes to `io`, which runs one thing at a time. */
class AppController(
    private val store: Store,
    private val main: MainThread,
    private val io: Executor,
    private val engines: EngineFactory,
    private val library: ModelLibrary,
    private val bundled: () -> List<BundledModel>,
    private val transcript: File,
    private val settingsFile: SettingsFile,
    val plan: BenchmarkPlan = BenchmarkPlan(),
) {
    /** One engine and the model that it was started for. */
    private inner class Running(val model: ModelEntry, val placement: Placement) : EngineObserver {
        lateinit var engine: Engine
        private lateinit var greeting: Greeting
        private var asking = false // drivers of GPUs are at work

        override fun onReady(greeting: Greeting) {
            this.greeting = greeting
            if (this !== running) return
            engine.load(LoadRequest(model.directory.path, placement = placement), ::onLoaded)
        }

        private fun onLoaded(outcome: Outcome<Event.Loaded>) {
            if (this !== running) return
            when (outcome) {
                is Outcome.Success -> {
                    context.lost()
                    store.dispatch(Action.EngineReady(model, greeting.version, outcome.value))
                    refresh()
                    if (driversWork) askDevices()
                }
                is Outcome.Failure -> if (outcome.error.kind != EngineError.Kind.ENDED) {
                    store.dispatch(Action.EngineRefused(model, outcome.error.message))
                    engine.close()
                }
            }
        }

        private fun askDevices() {
            asking = true
            engine.devices { outcome ->
                if (outcome is Outcome.Success) {
                    asking = false
                    if (this === running) store.dispatch(Action.DevicesListed(outcome.value.devices))
                }
            }
        }

        override fun onEnd(end: EngineEnd) {
            if (this !== running) return
            if (asking && end != EngineEnd.Closed && end != EngineEnd.Killed(SIGKILL)) {
                // A driver took the engine with it: the app goes on without asking for GPUs.
                driversWork = false
                next = model to Placement.CPU
            }
            running = null
            benchmark = null
            budgetWanted = null
            budgetGiven = null
            budgetAsked = false
            store.dispatch(Action.EngineEnded(end))
            next?.let { (model, placement) -> start(model, placement) }
        }
    }

    private var running: Running? = null
    private var lastPlacement = Placement.CPU
    private var driversWork = true
    private var next: Pair<ModelEntry, Placement>? = null // to be opened when the running one has ended
    private val context = EngineContext()
    private var polling = false
    private var budgetAsked = false
    private var budgetWanted: Long? = null
    private var budgetGiven: Long? = null // what was in force before the system needed memory
    private var benchmark: BenchmarkRun? = null
    private var importCancelled = AtomicBoolean()

    private val state: AppState
        get() = store.state

    // The beginning, and what the system says.

    /** Unpacks what came with the app, lists the models, and opens the one that was open last. */
    fun start() {
        importCancelled = AtomicBoolean()
        val cancelled = importCancelled
        io.execute {
            library.sweep()
            try {
                for (model in bundled()) {
                    if (library.find(model.manifest, bundled = true) == null) import(model.source, true, cancelled)
                }
                main.execute { store.dispatch(Action.ImportEnded(null)) }
            } catch (error: ModelException) {
                main.execute { store.dispatch(Action.ImportFailed(error.message.orEmpty())) }
            } catch (_: ImportCancelled) {
                main.execute { store.dispatch(Action.ImportEnded(null)) }
            }
            val last = Transcript.read(transcript)
            val settings = settingsFile.read()
            val models = library.list()
            main.execute {
                store.dispatch(Action.ModelsListed(models))
                store.dispatch(Action.SettingsRestored(settings))
                if (last.messages.isNotEmpty()) store.dispatch(Action.ChatRestored(last.messages))
                val model = models.find { it.id == last.modelId } ?: models.firstOrNull()
                if (model != null && running == null) {
                    open(model)
                    store.dispatch(Action.ScreenChosen(Screen.CHAT))
                }
            }
        }
    }

    /** Writes down what must outlast the app's process. */
    fun save() {
        val kept = Transcript(state.engine.modelOrNull?.id, state.chat.messages)
        io.execute {
            try {
                kept.write(transcript)
            } catch (error: IOException) {
                main.execute { store.dispatch(Action.Told(Notice.Trouble(error.message.orEmpty()))) }
            }
        }
    }

    /** The system needs memory: the engine keeps the least that works with. */
    fun giveMemoryBack() {
        val engine = running?.engine ?: return
        if (state.engine !is EngineState.Ready) return
        val before = (state.engine as EngineState.Ready).memory.budget
        engine.trim(0) { outcome ->
            if (outcome is Outcome.Success) {
                if (budgetGiven == null && outcome.value.memory.budget < before) budgetGiven = before
                store.dispatch(Action.MemoryGivenBack(outcome.value.memory))
            }
        }
    }

    /** The app is in front again: what it gave back it asks for, so far as nobody has moved the budget since. */
    fun inFront() {
        val before = budgetGiven ?: return
        setBudget(before)
    }

    fun choose(screen: Screen) = store.dispatch(Action.ScreenChosen(screen))

    fun noticeRead() = store.dispatch(Action.NoticeRead)

    fun tell(notice: Notice) = store.dispatch(Action.Told(notice))

    // Models.

    fun importModel(source: ArtifactSource) {
        if (state.importing is ImportState.Running) return
        importCancelled = AtomicBoolean()
        val cancelled = importCancelled
        io.execute {
            val action = try {
                Action.ImportEnded(import(source, false, cancelled).name)
            } catch (error: ModelException) {
                Action.ImportFailed(error.message.orEmpty())
            } catch (_: ImportCancelled) {
                Action.ImportEnded(null)
            }
            val models = library.list()
            main.execute {
                store.dispatch(action)
                store.dispatch(Action.ModelsListed(models))
            }
        }
    }

    private fun import(source: ArtifactSource, bundled: Boolean, cancelled: AtomicBoolean): ModelEntry =
        Importer(library, cancelled) { progress -> main.execute { store.dispatch(Action.ImportAdvanced(bundled, progress)) } }
            .import(source, bundled)

    fun cancelImport() = importCancelled.set(true)

    fun delete(model: ModelEntry) {
        if (state.engine.modelOrNull?.id == model.id) close()
        io.execute {
            val trouble = try {
                library.delete(model)
                null
            } catch (error: ModelException) {
                error.message
            }
            val models = library.list()
            main.execute {
                if (trouble != null) tell(Notice.Trouble(trouble))
                store.dispatch(Action.ModelsListed(models))
            }
        }
    }

    // The engine.

    /** Opens `model` in an engine of its own; one that runs is ended before, so that the two do not need memory at once. */
    fun open(model: ModelEntry, placement: Placement = Placement.CPU) {
        val before = running ?: return start(model, placement)
        next = model to placement
        store.dispatch(Action.EngineOpening(model))
        before.engine.close()
    }

    private fun start(model: ModelEntry, placement: Placement) {
        next = null
        lastPlacement = placement
        store.dispatch(Action.EngineOpening(model))
        val started = Running(model, placement)
        running = started
        started.engine = engines.start(started)
    }

    /** The same model again, after the engine has ended or with another device. */
    fun restart(placement: Placement = lastPlacement) {
        state.engine.modelOrNull?.let { open(it, placement) }
    }

    fun close() {
        next = null
        running?.engine?.close()
    }

    /** Asks for a budget in bytes. While one is being set only the last of those that come is kept. */
    fun setBudget(bytes: Long) {
        if (state.engine !is EngineState.Ready) return
        budgetGiven = null
        budgetWanted = bytes
        if (!budgetAsked) askBudget()
    }

    private fun askBudget() {
        val engine = running?.engine ?: return
        val bytes = budgetWanted ?: return
        budgetWanted = null
        budgetAsked = true
        engine.setBudget(Budget.Bytes(bytes)) { outcome ->
            budgetAsked = false
            when (outcome) {
                is Outcome.Success -> store.dispatch(Action.MemoryChanged(outcome.value.memory))
                is Outcome.Failure -> tellFailure(outcome.error)
            }
            askBudget()
        }
    }

    private fun tellFailure(error: EngineError) {
        if (error.kind != EngineError.Kind.ENDED) tell(Notice.FromEngine(error.message))
    }

    // The conversation.

    fun send(prompt: String) {
        if (canAsk() && prompt.isNotEmpty()) ask(Action.PromptSent(prompt))
    }

    /** Another answer to the last message, in place of the one that is there. */
    fun answerAgain() {
        if (canAsk() && state.chat.messages.isNotEmpty()) ask(Action.AnswerAskedAgain)
    }

    private fun canAsk() = running != null && state.engine is EngineState.Ready && !state.isBusy

    private fun ask(action: Action) {
        val engine = running?.engine ?: return
        val model = state.engine.modelOrNull ?: return
        store.dispatch(action)
        val settings = state.settingsOf(model)
        val format = model.chat ?: ChatFormat.PLAIN
        val telling = context.tell(format.prompt(turns(state.chat.messages, format), settings.system, LocalDate.now()))
        val request = GenerateRequest(
            pieces = telling.pieces,
            position = telling.position,
            maxNewTokens = settings.maxNewTokens,
            temperature = if (settings.greedy) 0.0 else settings.temperature,
            topK = settings.topK,
            topP = settings.topP,
            repetitionPenalty = settings.repetitionPenalty,
            seed = settings.seed ?: Random.nextLong(SettingField.SEED.high.toLong() + 1),
            stopTokens = format.stopTokenIds?.toIntArray(),
        )
        val stop = StopText(format.stopStrings)
        engine.generate(request, { token -> textCame(stop, token.text.orEmpty()) }) { answerCame(stop, it) }
        poll()
    }

    private fun textCame(stop: StopText, text: String) {
        val before = stop.found
        val shown = stop.push(text)
        if (shown.isNotEmpty()) store.dispatch(Action.TextArrived(shown))
        if (stop.found && !before) running?.engine?.cancel()
    }

    private fun answerCame(stop: StopText, outcome: Outcome<Event.Done>) {
        when (outcome) {
            is Outcome.Success -> {
                val rest = stop.flush()
                if (rest.isNotEmpty()) store.dispatch(Action.TextArrived(rest))
                store.dispatch(Action.AnswerEnded(outcome.value, stop.found))
                // What ended the answer is in the engine and not in the conversation.
                if (!stop.found) context.answered(state.chat.messages.last().text, outcome.value.position)
            }
            is Outcome.Failure -> {
                val error = outcome.error
                val ending = when {
                    error.kind == EngineError.Kind.ENDED -> Ending.EngineEnded
                    TOO_LONG in error.message -> Ending.TooLong
                    else -> Ending.Failed(error.message)
                }
                store.dispatch(Action.AnswerFailed(ending))
            }
        }
        refresh()
    }

    fun cancelAnswer() {
        if (state.chat.answering) running?.engine?.cancel()
    }

    fun forgetConversation() {
        if (state.isBusy) return
        context.lost()
        store.dispatch(Action.ConversationForgotten)
        running?.engine?.reset(keepExperts = true) { outcome ->
            if (outcome is Outcome.Failure) tellFailure(outcome.error)
            refresh()
        }
    }

    /** For the open model; null: what its authors recommend. */
    fun changeSettings(settings: GenerationSettings?) {
        val model = state.engine.modelOrNull ?: return
        store.dispatch(Action.SettingsChanged(model.id, settings))
        val all = state.settings
        io.execute {
            try {
                settingsFile.write(all)
            } catch (error: IOException) {
                main.execute { tell(Notice.Trouble(error.message.orEmpty())) }
            }
        }
    }

    /** One report now. */
    private fun refresh() {
        running?.engine?.metrics { outcome -> if (outcome is Outcome.Success) store.dispatch(Action.Reported(outcome.value)) }
    }

    /** Reports as long as the engine computes, the next one only behind the last. */
    private fun poll() {
        val engine = running?.engine
        if (polling || engine == null || !state.isBusy) return
        polling = true
        main.later(POLL_MILLIS) {
            engine.metrics { outcome ->
                polling = false
                if (outcome is Outcome.Success) {
                    store.dispatch(Action.Reported(outcome.value))
                    poll()
                }
            }
        }
    }

    // The benchmark.

    fun startBenchmark() {
        val engine = running?.engine ?: return
        val ready = state.engine as? EngineState.Ready ?: return
        if (state.isBusy) return
        store.dispatch(Action.BenchmarkStarted(plan.runs.size))
        context.lost()
        benchmark = BenchmarkRun(
            engine,
            ready.loaded.model,
            ready.memory.budget,
            plan,
            onRow = { store.dispatch(Action.BenchmarkAdvanced(it)) },
            onEnd = { incomplete ->
                benchmark = null
                store.dispatch(Action.BenchmarkEnded(incomplete))
                refresh()
            },
        ).also { it.start() }
        poll()
    }

    fun cancelBenchmark() {
        if (state.benchmark is BenchmarkState.Running) benchmark?.cancel()
    }

    /** Writes the results that are there to what `open` opens; `phone` and `system` say where they were measured. */
    fun exportBenchmark(name: String, phone: String, system: String, open: () -> OutputStream) {
        val finished = state.benchmark as? BenchmarkState.Finished ?: return
        val engine = state.engine as? EngineState.Ready
        val context = BenchmarkContext(
            phone,
            system,
            engine?.version.orEmpty(),
            state.engine.modelOrNull?.id.orEmpty(),
            engine?.loaded?.placement ?: Placement.CPU,
            Instant.now().truncatedTo(ChronoUnit.SECONDS).toString(),
        )
        val text = benchmarkJson(context, plan, finished.rows).toString(2) + "\n"
        io.execute {
            val notice = try {
                open().use { it.write(text.toByteArray(Charsets.UTF_8)) }
                Notice.Exported(name)
            } catch (error: IOException) {
                Notice.ExportFailed(error.message.orEmpty())
            }
            main.execute { tell(notice) }
        }
    }

    private companion object {
        const val POLL_MILLIS = 400L

        /** In the engine's message where a prompt does not fit. */
        const val TOO_LONG = "more than the context of"
    }
}
