/** How answers are made: what a person can set, in which bounds, and what the model's authors recommend. */
package org.cfmoe.app.chat

import java.io.File
import java.io.IOException
import org.json.JSONException
import org.json.JSONObject

/** `seed` null: another one for each answer. `system` null: what the chat template itself says. */
data class GenerationSettings(
    val greedy: Boolean = true,
    val temperature: Double = 1.0,
    val topK: Int = 50,
    val topP: Double = 1.0,
    val repetitionPenalty: Double = 1.0,
    val seed: Long? = null,
    val maxNewTokens: Int = 512,
    val system: String? = null,
) {
    /** null: no number is set. */
    fun get(field: SettingField): Double? =
        when (field) {
            SettingField.TEMPERATURE -> temperature
            SettingField.TOP_K -> topK.toDouble()
            SettingField.TOP_P -> topP
            SettingField.REPETITION_PENALTY -> repetitionPenalty
            SettingField.SEED -> seed?.toDouble()
            SettingField.MAX_NEW_TOKENS -> maxNewTokens.toDouble()
        }

    /** `value` is within the bounds; null only for a seed. */
    fun with(field: SettingField, value: Double?): GenerationSettings =
        when (field) {
            SettingField.TEMPERATURE -> copy(temperature = value ?: temperature)
            SettingField.TOP_K -> copy(topK = value?.toInt() ?: topK)
            SettingField.TOP_P -> copy(topP = value ?: topP)
            SettingField.REPETITION_PENALTY -> copy(repetitionPenalty = value ?: repetitionPenalty)
            SettingField.SEED -> copy(seed = value?.toLong())
            SettingField.MAX_NEW_TOKENS -> copy(maxNewTokens = value?.toInt() ?: maxNewTokens)
        }

    fun toJson(): JSONObject =
        JSONObject()
            .put("greedy", greedy)
            .put("temperature", temperature)
            .put("top_k", topK)
            .put("top_p", topP)
            .put("repetition_penalty", repetitionPenalty)
            .put("seed", seed ?: JSONObject.NULL)
            .put("max_new_tokens", maxNewTokens)
            .put("system", system ?: JSONObject.NULL)

    companion object {
        /** What generation_config.json recommends, as transformers reads it; values that are none are left out. */
        fun recommended(file: File): GenerationSettings {
            val json = readObject(file)
            val plain = GenerationSettings()
            fun number(field: SettingField) = if (json.has(field.key)) field.parse(json.get(field.key).toString()) else null
            return GenerationSettings(
                greedy = !(json.opt("do_sample") as? Boolean ?: false),
                temperature = number(SettingField.TEMPERATURE) ?: plain.temperature,
                topK = number(SettingField.TOP_K)?.toInt() ?: plain.topK,
                topP = number(SettingField.TOP_P) ?: plain.topP,
                repetitionPenalty = number(SettingField.REPETITION_PENALTY) ?: plain.repetitionPenalty,
                maxNewTokens = number(SettingField.MAX_NEW_TOKENS)?.toInt() ?: plain.maxNewTokens,
            )
        }

        /** Raises JSONException. Numbers out of bounds become those of `otherwise`. */
        fun fromJson(json: JSONObject, otherwise: GenerationSettings): GenerationSettings {
            fun number(field: SettingField) = field.parse(json.get(field.key).toString())
            return GenerationSettings(
                json.getBoolean("greedy"),
                number(SettingField.TEMPERATURE) ?: otherwise.temperature,
                number(SettingField.TOP_K)?.toInt() ?: otherwise.topK,
                number(SettingField.TOP_P) ?: otherwise.topP,
                number(SettingField.REPETITION_PENALTY) ?: otherwise.repetitionPenalty,
                if (json.isNull("seed")) null else number(SettingField.SEED)?.toLong(),
                number(SettingField.MAX_NEW_TOKENS)?.toInt() ?: otherwise.maxNewTokens,
                if (json.isNull("system")) null else json.getString("system"),
            )
        }
    }
}

/** A number that can be set, by its name in JSON, and its bounds, both allowed. */
enum class SettingField(val key: String, val low: Double, val high: Double, val whole: Boolean) {
    TEMPERATURE("temperature", 0.01, 5.0, false),
    TOP_K("top_k", 0.0, 1000.0, true),
    TOP_P("top_p", 0.01, 1.0, false),
    REPETITION_PENALTY("repetition_penalty", 0.5, 2.0, false),
    SEED("seed", 0.0, 4294967295.0, true),
    MAX_NEW_TOKENS("max_new_tokens", 1.0, 32768.0, true);

    /** The number, or null where `text` is none within the bounds. A comma does for a point. */
    fun parse(text: String): Double? {
        val number = text.trim().replace(',', '.').toDoubleOrNull() ?: return null
        return number.takeIf { it in low..high && (!whole || it == Math.floor(it)) }
    }

    /** A value as it stands in a field: no fraction where there is none. */
    fun text(value: Double): String = if (value == Math.floor(value)) value.toLong().toString() else value.toString()
}

/** What was set, by a model's id, as a file. */
class SettingsFile(private val file: File) {
    /** None where there is no file, or none that can be read. */
    fun read(): Map<String, GenerationSettings> {
        val json = readObject(file)
        return try {
            json.keys().asSequence().associateWith { GenerationSettings.fromJson(json.getJSONObject(it), GenerationSettings()) }
        } catch (_: JSONException) { // of another version of the app
            emptyMap()
        }
    }

    /** Replaces the file. Raises IOException. */
    fun write(settings: Map<String, GenerationSettings>) {
        val json = settings.entries.fold(JSONObject()) { all, (id, one) -> all.put(id, one.toJson()) }
        val temporary = File(file.path + ".new")
        temporary.writeText(json.toString())
        if (!temporary.renameTo(file)) throw IOException("${file.path} cannot be replaced")
    }
}

/** The object in a file; an empty one where there is none that can be read. */
private fun readObject(file: File): JSONObject =
    try {
        JSONObject(file.readText())
    } catch (_: IOException) {
        JSONObject()
    } catch (_: JSONException) {
        JSONObject()
    }
