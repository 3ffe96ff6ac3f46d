/** What an artifact's manifest.json says of the model and of the files that belong to it: docs/artifact-format.md. */
package org.cfmoe.app.models

import org.cfmoe.app.chat.ChatFormat
import org.json.JSONException
import org.json.JSONObject

/** Something about a model that a person is told in one line. */
class ModelException(message: String, cause: Throwable? = null) : Exception(message, cause)

/** `chat` null: the model has no chat template, or one that says more than `chat` can; then `chatAbsent` says what. */
data class Manifest(
    val name: String,
    val parameters: Long,
    val layers: Int,
    val experts: Int,
    val files: Map<String, FileFacts>,
    val chat: ChatFormat?,
    val chatAbsent: String,
) {
    val totalBytes: Long
        get() = files.values.sumOf { it.size }

    companion object {
        const val FILE = "manifest.json"
        private const val FORMAT = "cfmoe-artifact"
        private const val VERSION = 1

        /** Raises ModelException where `text` is no manifest that this app knows. */
        fun parse(text: String): Manifest =
            try {
                val json = JSONObject(text)
                if (json.optString("format") != FORMAT) throw ModelException("$FILE is not that of a CFMoE artifact")
                val version = json.getInt("format_version")
                if (version != VERSION) throw ModelException("the artifact has format $version, the app reads $VERSION: compile it again")
                val model = json.getJSONObject("model")
                val files = json.getJSONObject("files")
                Manifest(
                    model.getString("name"),
                    model.getLong("parameters"),
                    model.getInt("num_layers"),
                    model.getInt("num_experts"),
                    files.keys().asSequence().associate { safePath(it) to facts(files.getJSONObject(it)) },
                    json.optJSONObject("chat")?.let { ChatFormat.parse(it, model.getInt("vocab_size")) },
                    json.optString("chat_absent"),
                )
            } catch (error: JSONException) {
                throw ModelException("$FILE is damaged: ${error.message}", error)
            }

        private fun facts(json: JSONObject): FileFacts {
            val size = json.getLong("size")
            if (size < 0) throw ModelException("$FILE is damaged: a size of $size")
            return FileFacts(size, json.getString("sha256"))
        }
    }
}

/** `sha256` in lower-case hexadecimal digits. */
data class FileFacts(val size: Long, val sha256: String)

/** `path` if it is a plain path that stays inside the directory that it is relative to; else raises ModelException. */
fun safePath(path: String): String {
    val parts = path.split('/')
    val strange = path.any { it < ' ' || it == '\\' || it == '\u007f' }
    val outward = parts.any { it.isEmpty() || it == "." || it == ".." }
    if (strange || outward) throw ModelException("the file name ${path.take(80)} leads out of the model or is none")
    return path
}
