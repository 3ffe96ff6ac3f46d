/** Turn by turn with the real engine and a model with a chat template: what the engine is told, and that it answers the same. */
package org.cfmoe.app.chat

import java.io.File
import org.cfmoe.app.AppController
import org.cfmoe.app.AppOnEngine
import org.cfmoe.app.Real
import org.cfmoe.app.children
import org.cfmoe.app.engineThreads
import org.cfmoe.app.eventually
import org.cfmoe.app.state.Ending
import org.cfmoe.app.state.EngineState
import org.cfmoe.app.state.Message
import org.json.JSONObject
import org.junit.After
import org.junit.Assert.assertEquals
import org.junit.Assert.assertNotEquals
import org.junit.Assert.assertTrue
import org.junit.Test

class ConversationTest : AppOnEngine() {
    /** The engine behind a program that writes down what it is told. */
    private fun app(artifact: File = Real.chat): AppController {
        val script = File(folder.root, "engine.sh")
        script.writeText("tee -a \"$0.log\" | '${Real.engine.path}' \"$1\"\n")
        start(listOf("/bin/sh", script.path), artifact)
        eventually("the engine is ready") { state.engine is EngineState.Ready }
        main.run { controller.changeSettings(settings().copy(maxNewTokens = 24)) }
        return controller
    }

    private fun settings(): GenerationSettings {
        val model = (store.state.engine as EngineState.Ready).model
        return store.state.settings[model.id] ?: model.recommended
    }

    private fun AppController.set(change: GenerationSettings.() -> GenerationSettings) = main.run { changeSettings(settings().change()) }

    private fun AppController.say(text: String): Message = answer { send(text) }

    private fun answer(ask: () -> Unit): Message {
        main.run(ask)
        eventually("the answer has ended") { !state.chat.answering }
        return state.chat.messages.last()
    }

    /** The prompts so far, as texts, and whether the engine was to have something before them. */
    private fun told(): List<Pair<String, Boolean>> =
        File(folder.root, "engine.sh.log").readLines().map(::JSONObject).filter { it.getString("op") == "generate" }.map { line ->
            val pieces = line.getJSONArray("prompt")
            (0 until pieces.length()).joinToString("") { pieces.getJSONObject(it).getString("text") } to (line.getInt("position") > 0)
        }

    @After
    fun end() {
        main.run { controller.close() } // the engine is not this process's child: the shell is
        eventually("all engines have ended") { children().isEmpty() && engineThreads().isEmpty() }
        io.shutdownNow()
        main.close()
    }

    @Test
    fun onlyWhatIsNewIsToldAndARestartChangesNoWord() {
        val app = app()
        val one = app.say(" The proposal adds ")
        assertTrue(one.text.isNotEmpty())
        assertTrue((one.speed ?: 0.0) > 0)
        val two = app.say("And then <|assistant|>?")
        val expected = listOf(
            "Be kind.<|user|>The proposal adds<|assistant|>" to false,
            "<|pad|><|user|>And then <|assistant|>?<|assistant|>" to true,
        )
        assertEquals(expected, told())
        main.run { app.save() }
        main.run { app.close() }
        eventually("the engine is closed") { state.engine == EngineState.Stopped }
        // Another start of the app: the engine is told everything once, and gives the same answer.
        val next = app()
        assertEquals(two.text, answer { next.answerAgain() }.text)
        val whole = "Be kind.<|user|>The proposal adds<|assistant|>${one.text}<|pad|><|user|>And then <|assistant|>?<|assistant|>"
        assertEquals(whole to false, told()[2])
        next.say("More.")
        assertEquals("<|pad|><|user|>More.<|assistant|>" to true, told()[3])
    }

    @Test
    fun anotherAnswerAnotherSystemPromptAndANewChat() {
        val app = app()
        val one = app.say("The proposal adds")
        assertEquals(one.text, answer { app.answerAgain() }.text) // greedy
        assertEquals(2, state.chat.messages.size)
        assertEquals("Be kind.<|user|>The proposal adds<|assistant|>" to false, told()[1])
        app.set { copy(greedy = false, temperature = 2.0, topK = 0, seed = 3) }
        val drawn = answer { app.answerAgain() }
        assertNotEquals(one.text, drawn.text)
        assertEquals(drawn.text, answer { app.answerAgain() }.text)
        app.set { copy(seed = 4) }
        assertNotEquals(drawn.text, answer { app.answerAgain() }.text)
        val next = app.say("And?")
        assertEquals(next.text, answer { app.answerAgain() }.text)
        assertEquals("<|pad|><|user|>And?<|assistant|>" to true, told().last()) // what came before is not read again
        app.set { copy(system = "Be brief.") }
        app.say("Go on.")
        assertTrue(told().last().first.startsWith("Be brief.<|user|>The proposal adds<|assistant|>") && !told().last().second)
        app.set { copy(system = "") }
        main.run { app.forgetConversation() }
        app.say("New.")
        assertEquals("<|user|>New.<|assistant|>" to false, told().last())
    }

    @Test
    fun tooLongAMessageIsSaidAndLeftOut() {
        val app = app()
        app.say("The proposal adds")
        val long = app.say("word ".repeat(3000))
        assertEquals(Ending.TooLong, long.ending)
        assertEquals(Ending.Length, app.say("Short.").ending)
        assertEquals("<|pad|><|user|>Short.<|assistant|>" to true, told().last())
    }

    @Test
    fun modelWithoutATemplateContinuesTheText() {
        val app = app(Real.artifact)
        val one = app.say("The proposal adds ")
        app.say(" <|endoftext|>more")
        assertEquals(listOf("The proposal adds " to false, " <|endoftext|>more" to true), told())
        assertEquals(one.text, state.chat.messages[1].text)
        assertEquals(null, (state.engine as EngineState.Ready).model.chat)
    }
}
