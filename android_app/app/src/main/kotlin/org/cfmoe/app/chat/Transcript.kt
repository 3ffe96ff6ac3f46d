/** The conversation as a file, so that it is there again when Android has ended the app in the background. */
package org.cfmoe.app.chat

import java.io.File
import java.io.IOException
import org.cfmoe.app.state.Message
import org.json.JSONArray
import org.json.JSONException
import org.json.JSONObject

/** `modelId` is of the model that was open, null if none was. */
data class Transcript(val modelId: String?, val messages: List<Message>) {
    /** Replaces `file`. Raises IOException. */
    fun write(file: File) {
        val rows = messages.map { JSONObject().put("author", it.author.name).put("text", it.text) }
        val json = JSONObject().put("model", modelId ?: JSONObject.NULL).put("messages", JSONArray(rows))
        val temporary = File(file.path + ".new")
        temporary.writeText(json.toString())
        if (!temporary.renameTo(file)) throw IOException("${file.path} cannot be replaced")
    }

    companion object {
        /** What was written last; an empty one where there is none, or where it cannot be read. */
        fun read(file: File): Transcript =
            try {
                val json = JSONObject(file.readText())
                val rows = json.getJSONArray("messages")
                val messages = (0 until rows.length()).map { rows.getJSONObject(it) }.map { row ->
                    Message(Message.Author.valueOf(row.getString("author")), row.getString("text"))
                }
                Transcript(if (json.isNull("model")) null else json.getString("model"), messages)
            } catch (_: IOException) {
                Transcript(null, emptyList())
            } catch (_: JSONException) {
                Transcript(null, emptyList())
            } catch (_: IllegalArgumentException) { // an author of another version of the app
                Transcript(null, emptyList())
            }
    }
}
