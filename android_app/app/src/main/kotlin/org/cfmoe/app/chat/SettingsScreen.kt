/** How answers are made: numbers within their bounds, and the system prompt. What is right takes effect as it is typed. */
package org.cfmoe.app.chat

import android.text.Editable
import android.text.TextWatcher
import android.view.View
import android.widget.EditText
import android.widget.Switch
import android.widget.TextView
import java.time.LocalDate
import org.cfmoe.app.AppController
import org.cfmoe.app.R
import org.cfmoe.app.models.ModelEntry
import org.cfmoe.app.setTextIfNew
import org.cfmoe.app.state.AppState
import org.cfmoe.app.state.Screen
import org.cfmoe.app.state.modelOrNull
import org.cfmoe.app.state.settingsOf

class SettingsScreen(private val root: View, private val controller: AppController) {
    private val context = root.context
    private val greedy: Switch = root.findViewById(R.id.settings_greedy)
    private val system: EditText = root.findViewById(R.id.settings_system)
    private val rows = listOf(
        Row(SettingField.TEMPERATURE, R.id.settings_temperature, R.id.settings_temperature_name, R.string.settings_temperature),
        Row(SettingField.TOP_K, R.id.settings_top_k, R.id.settings_top_k_name, R.string.settings_top_k),
        Row(SettingField.TOP_P, R.id.settings_top_p, R.id.settings_top_p_name, R.string.settings_top_p),
        Row(
            SettingField.REPETITION_PENALTY,
            R.id.settings_repetition_penalty,
            R.id.settings_repetition_penalty_name,
            R.string.settings_repetition_penalty,
        ),
        Row(SettingField.SEED, R.id.settings_seed, R.id.settings_seed_name, R.string.settings_seed),
        Row(SettingField.MAX_NEW_TOKENS, R.id.settings_max_new_tokens, R.id.settings_max_new_tokens_name, R.string.settings_max_new_tokens),
    )
    private var model: ModelEntry? = null
    private var settings = GenerationSettings()
    private var showing = false // what changes is written by the app, not by the person

    /** A number: its field, and the line over it that says the bounds. */
    private inner class Row(private val field: SettingField, input: Int, name: Int, private val text: Int) {
        private val input: EditText = root.findViewById(input)
        private val low = field.text(field.low)
        private val high = field.text(field.high)

        init {
            root.findViewById<TextView>(name).text = context.getString(text, low, high)
            this.input.onText { typed(it) }
        }

        fun show(isGreedy: Boolean) {
            input.isEnabled = !isGreedy || field !in SAMPLING
            val value = settings.get(field)
            val there = input.text.toString()
            val same = if (there.isBlank()) value == null else field.parse(there) == value
            if (!same && !input.hasFocus()) write(value)
        }

        fun write(value: Double?) {
            input.setText(value?.let(field::text).orEmpty())
            input.error = null
        }

        private fun typed(text: String) {
            val number = field.parse(text)
            val right = number != null || (field == SettingField.SEED && text.isBlank())
            val range = if (field.whole) R.string.settings_range_whole else R.string.settings_range
            input.error = if (right) null else context.getString(range, low, high)
            if (right && !showing) change(settings.with(field, number))
        }
    }

    init {
        greedy.setOnCheckedChangeListener { _, checked -> if (!showing) change(settings.copy(greedy = checked)) }
        system.onText { text ->
            // Without a text of the template's own an empty one is none.
            val own = model?.chat?.system?.default.orEmpty()
            if (!showing) change(settings.copy(system = text.takeIf { it.isNotEmpty() || own.isNotEmpty() }))
        }
        root.findViewById<View>(R.id.settings_reset).setOnClickListener {
            controller.changeSettings(null)
            model?.let { model -> writing { writeAll(model, model.recommended) } }
        }
        root.findViewById<View>(R.id.settings_done).setOnClickListener { controller.choose(Screen.CHAT) }
    }

    fun show(state: AppState) {
        val now = state.engine.modelOrNull
        root.isEnabled = now != null
        if (now == null) return
        settings = state.settingsOf(now)
        root.findViewById<TextView>(R.id.settings_title).setTextIfNew(context.getString(R.string.settings_title, now.name))
        writing {
            if (now.id != model?.id) writeAll(now, settings)
            model = now
            greedy.isChecked = settings.greedy
            rows.forEach { it.show(settings.greedy) }
        }
        val visibility = if (now.chat?.system == null) View.GONE else View.VISIBLE
        system.visibility = visibility
        root.findViewById<View>(R.id.settings_system_name).visibility = visibility
    }

    private fun writeAll(model: ModelEntry, settings: GenerationSettings) {
        this.settings = settings
        SettingField.values().zip(rows).forEach { (field, row) -> row.write(settings.get(field)) }
        val own = model.chat?.system?.default.orEmpty()
        system.setText(settings.system ?: model.chat?.dated(own, LocalDate.now()).orEmpty())
    }

    private fun writing(work: () -> Unit) {
        showing = true
        work()
        showing = false
    }

    private fun change(settings: GenerationSettings) {
        this.settings = settings
        controller.changeSettings(settings)
    }

    private fun EditText.onText(action: (String) -> Unit) =
        addTextChangedListener(object : TextWatcher {
            override fun beforeTextChanged(text: CharSequence, start: Int, count: Int, after: Int) = Unit

            override fun onTextChanged(text: CharSequence, start: Int, before: Int, count: Int) = Unit

            override fun afterTextChanged(text: Editable) = action(text.toString())
        })

    private companion object {
        /** What does nothing where always the likeliest word is taken. */
        val SAMPLING = setOf(SettingField.TEMPERATURE, SettingField.TOP_K, SettingField.TOP_P, SettingField.SEED)
    }
}
