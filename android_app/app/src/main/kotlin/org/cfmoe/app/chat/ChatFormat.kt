/** How a conversation is written for a model: the manifest's `chat`, docs/artifact-format.md. */
package org.cfmoe.app.chat

import java.time.LocalDate
import java.time.format.TextStyle
import java.util.Locale
import org.cfmoe.app.engine.Piece
import org.cfmoe.app.models.ModelException
import org.json.JSONArray
import org.json.JSONException
import org.json.JSONObject

/** A question and, but for the last, its answer. */
data class Turn(val user: String, val answer: String?)

/** `default` is the text that the template takes by itself; `empty` stands in front where the text is to be empty. */
data class SystemFormat(val before: String, val after: String, val empty: String, val default: String, val trim: Boolean)

/** The texts stand so: begin, user, replied, answer, next, user, reply, and the new answer follows. */
data class ChatFormat(
    val begin: String,
    val reply: String,
    val replied: String,
    val next: String,
    val system: SystemFormat?,
    val trimUser: Boolean,
    val trimAnswer: Boolean,
    val thinkingEnd: String,
    val thinkingTrim: ThinkingTrim,
    val dateFormat: String,
    val stopTokenIds: List<Int>?,
    val stopStrings: List<String>,
) {
    enum class ThinkingTrim { NONE, NEWLINES, ALL }

    /** All turns, of which the last has no answer. `system` null leaves the system's text to the template. */
    fun prompt(turns: List<Turn>, system: String?, today: LocalDate): List<Piece> {
        val pieces = ArrayList<Piece>()
        val given = this.system
        when {
            system == null || given == null -> pieces += Piece(begin, false)
            system.isEmpty() -> pieces += Piece(given.empty, false)
            else -> {
                pieces += Piece(given.before, false)
                pieces += Piece(if (given.trim) trimmed(system) else system, true)
                pieces += Piece(given.after, false)
            }
        }
        for (turn in turns) {
            pieces += Piece(if (trimUser) trimmed(turn.user) else turn.user, true)
            if (turn.answer == null) {
                pieces += Piece(reply, false)
            } else {
                pieces += Piece(replied, false)
                pieces += Piece(past(turn.answer), true)
                pieces += Piece(next, false)
            }
        }
        return pieces.map { if (it.typed) it else it.copy(text = dated(it.text, today)) }.filter { it.text.isNotEmpty() }
    }

    /** An answer as the template takes it: what stands before it in the past anyway, often a space, the model has written itself. */
    fun said(answer: String): String = if (replied.startsWith(reply)) answer.removePrefix(replied.drop(reply.length)) else answer

    /** What stays of an answer once it lies in the past. */
    fun past(answer: String): String {
        var kept = answer
        if (thinkingEnd.isNotEmpty() && thinkingEnd in answer) {
            kept = answer.substringAfterLast(thinkingEnd)
            kept = when (thinkingTrim) {
                ThinkingTrim.NONE -> kept
                ThinkingTrim.NEWLINES -> kept.trimStart('\n')
                ThinkingTrim.ALL -> kept.trimStart { it in WHITESPACE }
            }
        }
        return if (trimAnswer) trimmed(kept) else kept
    }

    /** How many characters of an answer are thoughts, in front of what it says; all of them while it still thinks. */
    fun thoughtLength(answer: String): Int {
        val end = if (thinkingEnd.isEmpty()) -1 else answer.lastIndexOf(thinkingEnd)
        val begin = thinkingEnd.replace("/", "")
        return when {
            end >= 0 -> end + thinkingEnd.length
            thinkingEnd.isNotEmpty() && (begin in reply || answer.trimStart().startsWith(begin)) -> answer.length
            else -> 0
        }
    }

    /** `text` with the date of `today` where the template has one. */
    fun dated(text: String, today: LocalDate): String = text.replace(DATE_MARK, formatted(today))

    private fun formatted(day: LocalDate): String {
        val parts = dateFormat.split('%')
        return parts.drop(1).fold(parts[0]) { text, part -> text + directive(part[0], day) + part.drop(1) }
    }

    private fun directive(name: Char, day: LocalDate): String =
        when (name) {
            'Y' -> padded(day.year, 4)
            'm' -> padded(day.monthValue, 2)
            'd' -> padded(day.dayOfMonth, 2)
            'j' -> padded(day.dayOfYear, 3)
            'B' -> day.month.getDisplayName(TextStyle.FULL, Locale.ENGLISH)
            'b' -> day.month.getDisplayName(TextStyle.FULL, Locale.ENGLISH).take(3)
            else -> day.dayOfWeek.getDisplayName(TextStyle.FULL, Locale.ENGLISH)
        }

    private fun padded(number: Int, digits: Int) = number.toString().padStart(digits, '0')

    companion object {
        /** A model without a chat template continues text. */
        val PLAIN = ChatFormat("", "", "", "", null, false, false, "", ThinkingTrim.NONE, "", null, emptyList())

        private const val DATE_MARK = "\uE000"
        private const val DIRECTIVES = "YmdBbjA"
        private const val MOST_TEXT = 16 shl 10
        private const val MOST_STOPS = 64
        private const val MOST_SHORT = 256

        // What Python's str.strip takes away, which is what templates trim with.
        private val WHITESPACE: Set<Char> =
            ("\t\n\u000b\u000c\r\u001c\u001d\u001e\u001f \u0085\u00a0\u1680\u2028\u2029\u202f\u205f\u3000".toSet()) + ('\u2000'..'\u200a')

        private fun trimmed(text: String) = text.trim { it in WHITESPACE }

        /** Raises ModelException where `json` is not what docs/artifact-format.md says, JSONException where a field is missing. */
        fun parse(json: JSONObject, vocabSize: Int): ChatFormat {
            val form = text(json, "date_format", MOST_SHORT)
            if (form.split('%').drop(1).any { it.isEmpty() || it[0] !in DIRECTIVES }) throw damaged("date_format")
            return ChatFormat(
                text(json, "begin"),
                text(json, "reply"),
                text(json, "replied"),
                text(json, "next"),
                if (json.isNull("system")) null else system(json.getJSONObject("system")),
                json.getBoolean("trim_user"),
                json.getBoolean("trim_answer"),
                text(json, "thinking_end", MOST_SHORT),
                ThinkingTrim.values().find { it.name.lowercase() == json.getString("thinking_trim") } ?: throw damaged("thinking_trim"),
                form,
                all(json.getJSONArray("stop_token_ids"), "stop_token_ids") { rows, row ->
                    rows.getInt(row).also { if (it !in 0 until vocabSize) throw damaged("stop_token_ids") }
                },
                all(json.getJSONArray("stop_strings"), "stop_strings") { rows, row ->
                    rows.getString(row).also { if (it.length !in 1..MOST_SHORT) throw damaged("stop_strings") }
                },
            )
        }

        private fun system(json: JSONObject) =
            SystemFormat(text(json, "before"), text(json, "after"), text(json, "empty"), text(json, "default"), json.getBoolean("trim"))

        private fun text(json: JSONObject, name: String, most: Int = MOST_TEXT): String {
            val value = json.get(name) as? String ?: throw JSONException("$name is no text")
            if (value.codePointCount(0, value.length) > most) throw damaged(name)
            return value
        }

        private fun <T> all(rows: JSONArray, name: String, read: (JSONArray, Int) -> T): List<T> {
            if (rows.length() > MOST_STOPS) throw damaged(name)
            return (0 until rows.length()).map { read(rows, it) }
        }

        private fun damaged(name: String) = ModelException("manifest.json is damaged: chat.$name is out of bounds")
    }
}
