/** Owns what outlives an activity: the store, the controller and, through it, the engine. */
package org.cfmoe.app

import android.app.Application
import android.content.ComponentCallbacks2
import android.os.Handler
import android.os.Looper
import java.io.File
import java.util.concurrent.Executors
import org.cfmoe.app.chat.SettingsFile
import org.cfmoe.app.engine.EngineFactory
import org.cfmoe.app.engine.EngineProcess
import org.cfmoe.app.models.ModelLibrary
import org.cfmoe.app.models.bundledModels
import org.cfmoe.app.state.MainThread
import org.cfmoe.app.state.Store

class CfmoeApplication : Application() {
    lateinit var store: Store
        private set

    lateinit var controller: AppController
        private set

    override fun onCreate() {
        super.onCreate()
        val main = LooperThread()
        store = Store(main)
        // Native libraries are unpacked to the one directory of an app from which Android runs programs.
        val engine = File(applicationInfo.nativeLibraryDir, ENGINE)
        controller = AppController(
            store = store,
            main = main,
            io = Executors.newSingleThreadExecutor { Thread(it, "models") },
            engines = EngineFactory { observer -> EngineProcess.start(listOf(engine.path), filesDir, main, observer) },
            library = ModelLibrary(File(filesDir, "models")),
            bundled = { bundledModels(assets) },
            transcript = File(filesDir, "conversation.json"),
            settingsFile = SettingsFile(File(filesDir, "settings.json")),
        )
        controller.start()
    }

    override fun onTrimMemory(level: Int) {
        super.onTrimMemory(level)
        // UI_HIDDEN only says that the app went to the background: an answer may be under way, and the next one shall be fast.
        val pressing = level == ComponentCallbacks2.TRIM_MEMORY_RUNNING_LOW ||
            level == ComponentCallbacks2.TRIM_MEMORY_RUNNING_CRITICAL ||
            level >= ComponentCallbacks2.TRIM_MEMORY_BACKGROUND
        if (pressing) controller.giveMemoryBack()
    }

    override fun onLowMemory() {
        super.onLowMemory()
        controller.giveMemoryBack()
    }

    private companion object {
        const val ENGINE = "libcfmoe-engine.so"
    }
}

private class LooperThread : MainThread {
    private val looper = Looper.getMainLooper()
    private val handler = Handler(looper)

    override val isCurrent: Boolean
        get() = Thread.currentThread() === looper.thread

    override fun execute(command: Runnable) {
        handler.post(command)
    }

    override fun later(millis: Long, action: () -> Unit) {
        handler.postDelayed(action, millis)
    }
}
