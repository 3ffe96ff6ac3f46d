/** The one window: four screens behind tabs, a banner for the engine's end, a line for what is told once. */
package org.cfmoe.app

import android.app.Activity
import android.content.ActivityNotFoundException
import android.content.Intent
import android.net.Uri
import android.os.Build
import android.os.Bundle
import android.view.View
import android.widget.Button
import android.widget.TextView
import org.cfmoe.app.benchmark.BenchmarkScreen
import org.cfmoe.app.chat.ChatScreen
import org.cfmoe.app.chat.SettingsScreen
import org.cfmoe.app.engine.EngineEnd
import org.cfmoe.app.engine.SIGKILL
import org.cfmoe.app.models.ModelsScreen
import org.cfmoe.app.models.PickedArchive
import org.cfmoe.app.models.PickedDirectory
import org.cfmoe.app.models.createPicked
import org.cfmoe.app.panel.PanelScreen
import org.cfmoe.app.panel.size
import org.cfmoe.app.state.AppState
import org.cfmoe.app.state.EngineState
import org.cfmoe.app.state.Notice
import org.cfmoe.app.state.Screen
import org.cfmoe.app.state.modelOrNull

class MainActivity : Activity() {
    private lateinit var app: CfmoeApplication
    private lateinit var screens: Map<Screen, Pair<View, (AppState) -> Unit>>
    private lateinit var tabs: Map<Screen, Button>
    private var subscription: AutoCloseable? = null

    private val controller: AppController
        get() = app.controller

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        app = application as CfmoeApplication
        setContentView(R.layout.main)
        keepClearOfSystemBars()
        val models = ModelsScreen(findViewById(R.id.screen_models), controller, ::pickDirectory, ::pickArchive)
        val chat = ChatScreen(findViewById(R.id.screen_chat), controller)
        val settings = SettingsScreen(findViewById(R.id.screen_settings), controller)
        val panel = PanelScreen(findViewById(R.id.screen_panel), controller)
        val benchmark = BenchmarkScreen(findViewById(R.id.screen_benchmark), controller, ::pickExport)
        screens = mapOf(
            Screen.MODELS to (findViewById<View>(R.id.screen_models) to models::show),
            Screen.CHAT to (findViewById<View>(R.id.screen_chat) to chat::show),
            Screen.SETTINGS to (findViewById<View>(R.id.screen_settings) to settings::show),
            Screen.PANEL to (findViewById<View>(R.id.screen_panel) to panel::show),
            Screen.BENCHMARK to (findViewById<View>(R.id.screen_benchmark) to benchmark::show),
        )
        tabs = mapOf(
            Screen.MODELS to findViewById(R.id.tab_models),
            Screen.CHAT to findViewById(R.id.tab_chat),
            Screen.PANEL to findViewById(R.id.tab_panel),
            Screen.BENCHMARK to findViewById(R.id.tab_benchmark),
        )
        tabs.forEach { (screen, button) -> button.setOnClickListener { controller.choose(screen) } }
        findViewById<View>(R.id.engine_restart).setOnClickListener { controller.restart() }
        findViewById<View>(R.id.notice_dismiss).setOnClickListener { controller.noticeRead() }
    }

    override fun onStart() {
        super.onStart()
        subscription = app.store.subscribe(::show)
        controller.inFront()
    }

    override fun onStop() {
        subscription?.close()
        subscription = null
        controller.save()
        super.onStop()
    }

    private fun show(state: AppState) {
        screens.forEach { (screen, parts) ->
            val (view, show) = parts
            view.visibility = if (screen == state.screen) View.VISIBLE else View.GONE
            if (screen == state.screen) show(state)
        }
        val tab = if (state.screen == Screen.SETTINGS) Screen.CHAT else state.screen
        tabs.forEach { (screen, button) -> button.isSelected = screen == tab }
        showEngine(state.engine)
        val notice = state.notice?.let(::noticeText)
        findViewById<View>(R.id.notice).visibility = if (notice == null) View.GONE else View.VISIBLE
        findViewById<TextView>(R.id.notice_text).setTextIfNew(notice.orEmpty())
    }

    private fun showEngine(engine: EngineState) {
        val text = when (engine) {
            is EngineState.Died -> endText(engine.end)
            is EngineState.Refused -> getString(R.string.engine_refused, engine.model.name, engine.message)
            else -> null
        }
        findViewById<View>(R.id.engine_banner).visibility = if (text == null) View.GONE else View.VISIBLE
        findViewById<TextView>(R.id.engine_banner_text).setTextIfNew(text.orEmpty())
    }

    private fun endText(end: EngineEnd): String =
        when (end) {
            EngineEnd.Closed -> getString(R.string.engine_closed)
            is EngineEnd.Killed ->
                if (end.signal == SIGKILL) getString(R.string.engine_killed) else getString(R.string.engine_crashed, end.signal)
            is EngineEnd.Exited -> getString(R.string.engine_exited, end.code, end.lastWords)
            is EngineEnd.Broke -> getString(R.string.engine_broke, end.message)
            is EngineEnd.NotStarted -> getString(R.string.engine_not_started, end.message)
        }

    private fun noticeText(notice: Notice): String =
        when (notice) {
            is Notice.FromEngine -> notice.message
            is Notice.MemoryGivenBack -> getString(R.string.memory_given_back, size(this, notice.budget))
            is Notice.Imported -> getString(R.string.imported, notice.name)
            Notice.Copied -> getString(R.string.message_copied)
            is Notice.Exported -> getString(R.string.exported, notice.name)
            is Notice.ExportFailed -> getString(R.string.export_failed, notice.message)
            is Notice.Trouble -> notice.message
        }

    /** From Android 15 on the window lies below the bars and the keyboard. */
    private fun keepClearOfSystemBars() {
        findViewById<View>(R.id.root).setOnApplyWindowInsetsListener { view, insets ->
            view.setPadding(
                insets.systemWindowInsetLeft,
                insets.systemWindowInsetTop,
                insets.systemWindowInsetRight,
                insets.systemWindowInsetBottom,
            )
            insets.consumeSystemWindowInsets()
        }
    }

    // The system's file picker.

    private fun pickDirectory() = ask(Intent(Intent.ACTION_OPEN_DOCUMENT_TREE), PICK_DIRECTORY)

    private fun pickArchive() =
        ask(Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("*/*"), PICK_ARCHIVE)

    private fun pickExport() {
        val name = "cfmoe-${app.store.state.engine.modelOrNull?.name ?: "benchmark"}.json"
        val intent = Intent(Intent.ACTION_CREATE_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("application/json")
        ask(intent.putExtra(Intent.EXTRA_TITLE, name), PICK_EXPORT)
    }

    private fun ask(intent: Intent, request: Int) {
        try {
            startActivityForResult(intent, request)
        } catch (_: ActivityNotFoundException) {
            controller.tell(Notice.Trouble(getString(R.string.no_file_picker)))
        }
    }

    override fun onActivityResult(requestCode: Int, resultCode: Int, data: Intent?) {
        super.onActivityResult(requestCode, resultCode, data)
        val uri = data?.data
        if (resultCode != RESULT_OK || uri == null) return
        when (requestCode) {
            PICK_DIRECTORY -> controller.importModel(PickedDirectory(contentResolver, uri))
            PICK_ARCHIVE -> controller.importModel(PickedArchive(contentResolver, uri))
            PICK_EXPORT -> export(uri)
        }
    }

    private fun export(uri: Uri) {
        val phone = "${Build.MANUFACTURER} ${Build.MODEL} (${Build.HARDWARE})"
        val system = "Android ${Build.VERSION.RELEASE} (API ${Build.VERSION.SDK_INT})"
        controller.exportBenchmark(uri.lastPathSegment ?: uri.toString(), phone, system) { createPicked(contentResolver, uri) }
    }

    private companion object {
        const val PICK_DIRECTORY = 1
        const val PICK_ARCHIVE = 2
        const val PICK_EXPORT = 3
    }
}

/** Leaves a text alone that is there already, so that a screen reader does not say it again. */
fun TextView.setTextIfNew(value: CharSequence) {
    if (text.toString() != value.toString()) text = value
}
