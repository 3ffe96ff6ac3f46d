/** The models on this phone, and the import of others. */
package org.cfmoe.app.models

import android.app.AlertDialog
import android.view.LayoutInflater
import android.view.View
import android.view.ViewGroup
import android.widget.BaseAdapter
import android.widget.Button
import android.widget.ListView
import android.widget.ProgressBar
import android.widget.TextView
import org.cfmoe.app.AppController
import org.cfmoe.app.R
import org.cfmoe.app.panel.size
import org.cfmoe.app.setTextIfNew
import org.cfmoe.app.state.AppState
import org.cfmoe.app.state.EngineState
import org.cfmoe.app.state.ImportState
import org.cfmoe.app.state.modelOrNull

class ModelsScreen(private val root: View, private val controller: AppController, pickDirectory: () -> Unit, pickArchive: () -> Unit) {
    private val context = root.context
    private val rows = Rows()
    private val importDirectory: Button = root.findViewById(R.id.import_directory)
    private val importArchive: Button = root.findViewById(R.id.import_archive)
    private val importCancel: Button = root.findViewById(R.id.import_cancel)
    private val progress: ProgressBar = root.findViewById(R.id.import_progress)
    private val status: TextView = root.findViewById(R.id.import_status)
    private val checksum: TextView = root.findViewById(R.id.import_checksum)
    private var engine: EngineState = EngineState.Stopped

    init {
        val list = root.findViewById<ListView>(R.id.models_list)
        list.adapter = rows
        list.emptyView = root.findViewById(R.id.models_empty)
        importDirectory.setOnClickListener { pickDirectory() }
        importArchive.setOnClickListener { pickArchive() }
        importCancel.setOnClickListener { controller.cancelImport() }
    }

    fun show(state: AppState) {
        if (rows.models != state.models || engine != state.engine) {
            engine = state.engine
            rows.models = state.models
            rows.notifyDataSetChanged()
        }
        showImport(state.importing)
    }

    private fun showImport(importing: ImportState) {
        val running = importing as? ImportState.Running
        importDirectory.isEnabled = running == null
        importArchive.isEnabled = running == null
        importCancel.visibility = if (running == null) View.GONE else View.VISIBLE
        progress.visibility = importCancel.visibility
        status.setTextIfNew(
            when (importing) {
                ImportState.None -> ""
                is ImportState.Failed -> context.getString(R.string.import_failed, importing.message)
                is ImportState.Running -> runningText(importing)
            },
        )
        status.visibility = if (importing == ImportState.None) View.GONE else View.VISIBLE
        val checked = running?.progress?.takeIf { it.sha256.isNotEmpty() }
        checksum.visibility = if (checked == null) View.GONE else View.VISIBLE
        if (checked != null) checksum.text = context.getString(R.string.import_checksum, checked.checkedFile, checked.sha256)
        if (running != null) {
            val total = running.progress.total
            progress.isIndeterminate = total == null
            if (total != null && total > 0) progress.progress = (running.progress.done * progress.max / total).toInt()
        }
    }

    private fun runningText(running: ImportState.Running): String {
        val progress = running.progress
        val done = size(context, progress.done)
        val what = if (running.bundled) R.string.import_unpacking else R.string.import_copying
        val amount = progress.total?.let { context.getString(R.string.import_of, done, size(context, it)) } ?: done
        return context.getString(what, progress.file, amount)
    }

    private fun confirmDelete(model: ModelEntry) {
        AlertDialog.Builder(context)
            .setMessage(context.getString(R.string.delete_question, model.name, size(context, model.bytes)))
            .setPositiveButton(R.string.delete) { _, _ -> controller.delete(model) }
            .setNegativeButton(R.string.keep, null)
            .show()
    }

    private inner class Rows : BaseAdapter() {
        var models: List<ModelEntry> = emptyList()

        override fun getCount() = models.size

        override fun getItem(position: Int) = models[position]

        override fun getItemId(position: Int) = models[position].id.hashCode().toLong()

        override fun getView(position: Int, old: View?, parent: ViewGroup): View {
            val view = old ?: LayoutInflater.from(context).inflate(R.layout.row_model, parent, false)
            val model = models[position]
            view.findViewById<TextView>(R.id.model_name).text = model.name
            val facts = context.getString(R.string.model_facts, size(context, model.bytes), model.layers, model.experts)
            val open = engine.modelOrNull?.id == model.id
            view.findViewById<TextView>(R.id.model_facts).text = facts
            view.findViewById<TextView>(R.id.model_state).text = context.getString(
                when {
                    open && engine is EngineState.Ready -> R.string.model_open
                    open && engine is EngineState.Opening -> R.string.model_opening
                    model.bundled -> R.string.model_bundled
                    else -> R.string.model_imported
                },
            )
            view.findViewById<Button>(R.id.model_open).apply {
                isEnabled = !(open && (engine is EngineState.Ready || engine is EngineState.Opening))
                contentDescription = context.getString(R.string.open_model, model.name)
                setOnClickListener { controller.open(model) }
            }
            view.findViewById<Button>(R.id.model_delete).apply {
                visibility = if (model.bundled) View.GONE else View.VISIBLE
                contentDescription = context.getString(R.string.delete_model, model.name)
                setOnClickListener { confirmDelete(model) }
            }
            return view
        }
    }
}
