/** Conversations have the template's words, only what is new is told, answers end where they do, and settings stay within bounds. */
package org.cfmoe.app.chat

import java.io.File
import java.time.LocalDate
import org.cfmoe.app.Real
import org.cfmoe.app.engine.Piece
import org.cfmoe.app.models.ModelException
import org.cfmoe.app.state.Message
import org.json.JSONArray
import org.json.JSONException
import org.json.JSONObject
import org.junit.Assert.assertEquals
import org.junit.Assert.assertNull
import org.junit.Assert.assertThrows
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

class ChatFormatTest {
    @get:Rule
    val folder = TemporaryFolder()

    private fun text(pieces: List<Piece>) = pieces.joinToString("") { it.text }

    private fun texts(json: JSONArray) = (0 until json.length()).map { json.getString(it) }

    @Test
    fun conversationsHaveTheWordsOfTheTemplates() {
        val rows = JSONArray(Real.conversations.readText())
        var compared = 0
        for (row in (0 until rows.length()).map { rows.getJSONObject(it) }) {
            val format = ChatFormat.parse(row.getJSONObject("chat"), 100)
            val chats = row.getJSONArray("chats")
            for (chat in (0 until chats.length()).map { chats.getJSONObject(it) }) {
                val said = texts(chat.getJSONArray("messages"))
                val turns = said.chunked(2).map { Turn(it[0], it.getOrNull(1)) }
                val system = if (chat.isNull("system")) null else chat.getString("system")
                val pieces = format.prompt(turns, system, LocalDate.parse(chat.getString("day")))
                assertEquals(chat.getString("text"), text(pieces))
                compared += 1
            }
        }
        assertTrue("$compared", compared > 500)
    }

    private val chat = JSONObject(
        """{"begin": "<b>", "reply": "<r>", "replied": "<p>", "next": "<n>", "trim_user": true, "trim_answer": false,
            "system": {"before": "<s>", "after": "</s><b>", "empty": "<e>", "default": "d", "trim": false}, "thinking_end": "",
            "thinking_trim": "none", "date_format": "", "stop_token_ids": [1], "stop_strings": ["<n>"]}""",
    )

    @Test
    fun whatWasTypedIsApart() {
        val format = ChatFormat.parse(chat, 10)
        val pieces = format.prompt(listOf(Turn(" <n> ", "<r>"), Turn("x", null)), "<b>", LocalDate.EPOCH)
        assertEquals(listOf("<b>", "<n>", "<r>", "x"), pieces.filter { it.typed }.map { it.text })
        assertEquals("<s><b></s><b><n><p><r><n>x<r>", text(pieces))
        assertEquals("<e>x<r>", text(format.prompt(listOf(Turn("x", null)), "", LocalDate.EPOCH)))
        assertEquals("ab", text(ChatFormat.PLAIN.prompt(listOf(Turn("a", "b")), "s", LocalDate.EPOCH)))
    }

    @Test
    fun thoughtsAreToldFromWhatIsSaid() {
        val thinks = ChatFormat.parse(JSONObject(chat.toString()).put("thinking_end", "</think>"), 10)
        assertEquals(10, thinks.thoughtLength("so</think>\n yes"))
        assertEquals(9, thinks.thoughtLength("<think>so"))
        assertEquals(0, thinks.thoughtLength("yes <think>"))
        assertEquals(2, thinks.copy(reply = "<r><think>\n").thoughtLength("so"))
        assertEquals(0, ChatFormat.PLAIN.thoughtLength("<think>so</think>"))
    }

    @Test
    fun damagedFormatsAreRefused() {
        fun parse(change: JSONObject.() -> Unit) = ChatFormat.parse(JSONObject(chat.toString()).apply(change), 10)
        parse { put("system", JSONObject.NULL) }
        val long = "x".repeat(16385)
        for (change in listOf<JSONObject.() -> Unit>(
            { put("begin", long) },
            { put("date_format", "%H") },
            { put("date_format", "%") },
            { put("thinking_trim", "some") },
            { put("stop_token_ids", JSONArray(listOf(10))) },
            { put("stop_strings", JSONArray(listOf(""))) },
            { put("stop_strings", JSONArray(List(65) { "x" })) },
        )) assertThrows(ModelException::class.java) { parse(change) }
        for (change in listOf<JSONObject.() -> Unit>({ remove("next") }, { put("begin", 7) }, { put("trim_user", "no") })) {
            assertThrows(JSONException::class.java) { parse(change) }
        }
    }

    @Test
    fun engineIsToldWhatIsNew() {
        val context = EngineContext()
        fun tell(vararg texts: String) = context.tell(texts.mapIndexed { number, text -> Piece(text, number % 2 == 1) })
        assertEquals(Telling(listOf(Piece("<b>", false), Piece("one", true), Piece("<r>", false)), 0), tell("<b>", "one", "<r>"))
        context.answered(" two", 7)
        val more = tell("<b>", "one", "<r>", " two", "<n><b>", "three", "<r>")
        assertEquals(Telling(listOf(Piece("<n><b>", false), Piece("three", true), Piece("<r>", false)), 7), more)
        // Without an answer, or for another one, it goes back to the answer before; to the beginning if other words are wanted there.
        assertEquals(more, tell("<b>", "one", "<r>", " two", "<n><b>", "three", "<r>"))
        context.answered("x", 12)
        assertEquals(more, tell("<b>", "one", "<r>", " two", "<n><b>", "three", "<r>"))
        context.answered("", 9)
        assertEquals(more, tell("<b>", "one", "<r>", " two", "<n><b>", "three", "<r>"))
        assertEquals(0, tell("<b>", "two", "<r>").position)
        context.answered("y", 5)
        assertEquals(5, tell("<b>", "two", "<r>y", "z").position)
        context.lost()
        assertEquals(0, tell("<b>", "two", "<r>y", "z").position)
    }

    @Test
    fun turnsWithoutAnAnswerAreNotOfTheConversation() {
        fun messages(vararg texts: String) =
            texts.mapIndexed { number, text -> Message(Message.Author.values()[number % 2], text) }
        fun plain(vararg texts: String) = turns(messages(*texts), ChatFormat.PLAIN)
        assertEquals(listOf(Turn("c", null)), plain("a", "", "c", ""))
        assertEquals(listOf(Turn("a", " b"), Turn("c", null)), plain("a", " b", "c", "left over"))
        // The space that the template puts before an answer in the past is the one that the model has written.
        val spaced = ChatFormat.PLAIN.copy(reply = "A:", replied = "A: ")
        assertEquals(listOf(Turn("a", "b"), Turn("c", null)), turns(messages("a", " b", "c", ""), spaced))
        assertEquals(listOf(Turn("a", "b"), Turn("c", null)), turns(messages("a", "b", "c", ""), spaced))
    }

    @Test
    fun answersEndAtAText() {
        val stop = StopText(listOf("\n###", "User:"))
        assertEquals("Hello", stop.push("Hello\n#"))
        assertEquals("\n#x", stop.push("x"))
        assertEquals(" a", stop.push(" aUs"))
        assertEquals("", stop.push("er"))
        assertEquals(false, stop.found)
        assertEquals("", stop.push(":more"))
        assertTrue(stop.found)
        assertEquals("", stop.push("more") + stop.flush())
        val other = StopText(listOf("ab"))
        assertEquals("x", other.push("xa"))
        assertEquals("a", other.flush())
        assertEquals("as it is", StopText(emptyList()).push("as it is"))
    }

    @Test
    fun numbersStayWithinTheirBounds() {
        assertEquals(0.7, SettingField.TEMPERATURE.parse(" 0,7 ") ?: 0.0, 0.0)
        for (wrong in listOf("", "warm", "0", "5.1", "NaN", "1e999", "-1")) assertNull(wrong, SettingField.TEMPERATURE.parse(wrong))
        assertNull(SettingField.TOP_K.parse("1.5"))
        for (field in SettingField.values()) {
            for (edge in listOf(field.low, field.high)) assertEquals(edge, field.parse(field.text(edge)) ?: -1.0, 0.0)
            assertNull(field.parse((field.high + 1).toString()))
            val changed = GenerationSettings().with(field, field.high)
            assertEquals(field.high, changed.get(field) ?: -1.0, 0.0)
        }
        assertNull(GenerationSettings(seed = 4).with(SettingField.SEED, null).seed)
    }

    @Test
    fun recommendationsComeFromTheModel() {
        val file = File(folder.root, "generation_config.json")
        assertEquals(GenerationSettings(), GenerationSettings.recommended(file))
        file.writeText("""{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}""")
        val expected = GenerationSettings(greedy = false, temperature = 0.6, topK = 20, topP = 0.95, repetitionPenalty = 1.1)
        assertEquals(expected, GenerationSettings.recommended(file))
        file.writeText("""{"do_sample": "yes", "temperature": 99, "top_k": null, "top_p": []}""")
        assertEquals(GenerationSettings(), GenerationSettings.recommended(file))
    }

    @Test
    fun settingsOutlastTheApp() {
        val file = File(folder.root, "settings.json")
        assertEquals(emptyMap<String, GenerationSettings>(), SettingsFile(file).read())
        val set = GenerationSettings(false, 0.7, 40, 0.9, 1.05, 17, 99, "Be \"brief\".\n")
        SettingsFile(file).write(mapOf("m-1" to set, "m-2" to GenerationSettings()))
        assertEquals(mapOf("m-1" to set, "m-2" to GenerationSettings()), SettingsFile(file).read())
        // Out of bounds, or of another version: what is right stays, or nothing.
        file.writeText(file.readText().replace("0.7", "70"))
        assertEquals(set.copy(temperature = 1.0), SettingsFile(file).read()["m-1"])
        for (damage in listOf("", "{", "[]", """{"m-1": 5}""", """{"m-1": {}}""")) {
            file.writeText(damage)
            assertEquals(emptyMap<String, GenerationSettings>(), SettingsFile(file).read())
        }
    }
}
