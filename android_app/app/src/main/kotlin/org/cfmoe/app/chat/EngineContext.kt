/** What the running engine has of the conversation, and what it has to be told so that it has all of it. */
package org.cfmoe.app.chat

import org.cfmoe.app.engine.Piece
import org.cfmoe.app.state.Message

/** The conversation that the model shall know: what got no answer is not of it, but for the last. */
fun turns(messages: List<Message>, format: ChatFormat): List<Turn> {
    val pairs = messages.chunked(2)
    val past = pairs.dropLast(1).filter { it[1].text.isNotEmpty() }.map { Turn(it[0].text, format.said(it[1].text)) }
    return past + Turn(pairs.last()[0].text, null)
}

/** `pieces` go behind the first `position` tokens of what the engine has; what follows those it is to forget first. */
data class Telling(val pieces: List<Piece>, val position: Int)

class EngineContext {
    private class Mark(val text: String, val position: Int)

    private val marks = ArrayList<Mark>() // what the engine had read and written after each answer, and in how many tokens
    private var asked = ""

    /** The engine has nothing, or nobody knows what. */
    fun lost() = marks.clear()

    /** What is new behind the longest beginning that the engine has, word for word. */
    fun tell(prompt: List<Piece>): Telling {
        asked = prompt.joinToString("", transform = Piece::text)
        while (marks.isNotEmpty() && !continues(marks.last())) marks.removeAt(marks.lastIndex)
        val mark = marks.lastOrNull() ?: return Telling(prompt, 0)
        return Telling(without(prompt, mark.text.length), mark.position)
    }

    /** The engine has answered what was told last, and has `position` tokens now. */
    fun answered(answer: String, position: Int) {
        marks += Mark(asked + answer, position)
    }

    private fun continues(mark: Mark) = asked.length > mark.text.length && asked.startsWith(mark.text)

    private fun without(prompt: List<Piece>, length: Int): List<Piece> {
        var skip = length
        return prompt.mapNotNull { piece ->
            val cut = minOf(skip, piece.text.length)
            skip -= cut
            piece.copy(text = piece.text.drop(cut)).takeIf { it.text.isNotEmpty() }
        }
    }
}

/** Finds in an answer that comes in parts the first of the texts that end it. */
class StopText(private val stops: List<String>) {
    private var held = ""

    /** Whether one was found: what follows is not of the answer. */
    var found = false
        private set

    /** What can be shown now: what may still become a stop is held back. */
    fun push(text: String): String {
        if (found) return ""
        held += text
        val end = stops.map { held.indexOf(it) }.filter { it >= 0 }.minOrNull()
        if (end != null) {
            found = true
            return held.take(end).also { held = "" }
        }
        val most = minOf(held.length, (stops.maxOfOrNull { it.length } ?: 0) - 1)
        val kept = (most downTo 1).find { size -> stops.any { it.startsWith(held.takeLast(size)) } } ?: 0
        return held.dropLast(kept).also { held = held.takeLast(kept) }
    }

    /** The answer has ended: what was held back belongs to it. */
    fun flush(): String = held.also { held = "" }
}
