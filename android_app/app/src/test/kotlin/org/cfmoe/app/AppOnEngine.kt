/** What tests of the whole app begin with: its files in a folder that goes away, a main thread, a model that came with it. */
package org.cfmoe.app

import java.io.File
import java.util.concurrent.ExecutorService
import java.util.concurrent.Executors
import org.cfmoe.app.benchmark.BenchmarkPlan
import org.cfmoe.app.chat.SettingsFile
import org.cfmoe.app.engine.EngineFactory
import org.cfmoe.app.engine.EngineProcess
import org.cfmoe.app.models.ModelLibrary
import org.cfmoe.app.state.AppState
import org.cfmoe.app.state.Store
import org.junit.Rule
import org.junit.rules.TemporaryFolder

abstract class AppOnEngine {
    @get:Rule
    val folder = TemporaryFolder()

    protected val main = TestMainThread()
    protected val io: ExecutorService = Executors.newSingleThreadExecutor()
    protected lateinit var store: Store
    protected lateinit var controller: AppController

    protected val state: AppState
        get() = main.run { store.state }

    /** Another start of the app, with the files that the one before left; `command` runs the engine. */
    protected fun start(command: List<String>, artifact: File, plan: BenchmarkPlan = BenchmarkPlan()): AppController {
        store = main.run { Store(main) }
        controller = AppController(
            store = store,
            main = main,
            io = io,
            engines = EngineFactory { EngineProcess.start(command, folder.root, main, it) },
            library = ModelLibrary(File(folder.root, "models")),
            bundled = { listOf(BundledModel(File(artifact, "manifest.json").readBytes(), DirectorySource(artifact))) },
            transcript = File(folder.root, "conversation.json"),
            settingsFile = SettingsFile(File(folder.root, "settings.json")),
            plan = plan,
        )
        main.run { controller.start() }
        return controller
    }
}
