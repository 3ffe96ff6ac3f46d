/** The conversation: what was said, the answer as it comes, and the way to stop it. */
package org.cfmoe.app.chat

import android.view.LayoutInflater
import android.view.View
import android.view.ViewGroup
import android.widget.BaseAdapter
import android.widget.Button
import android.widget.EditText
import android.widget.ListView
import android.widget.TextView
import org.cfmoe.app.AppController
import org.cfmoe.app.R
import org.cfmoe.app.setTextIfNew
import org.cfmoe.app.state.AppState
import org.cfmoe.app.state.Ending
import org.cfmoe.app.state.EngineState
import org.cfmoe.app.state.Message
import org.cfmoe.app.state.isBusy

class ChatScreen(root: View, private val controller: AppController) {
    private val context = root.context
    private val rows = Rows()
    private val status: TextView = root.findViewById(R.id.chat_status)
    private val input: EditText = root.findViewById(R.id.chat_input)
    private val send: Button = root.findViewById(R.id.chat_send)
    private val stop: Button = root.findViewById(R.id.chat_stop)
    private val forget: Button = root.findViewById(R.id.chat_forget)

    init {
        root.findViewById<ListView>(R.id.chat_list).adapter = rows
        send.setOnClickListener {
            controller.send(input.text.toString())
            input.text.clear()
        }
        stop.setOnClickListener { controller.cancelAnswer() }
        forget.setOnClickListener { controller.forgetConversation() }
    }

    fun show(state: AppState) {
        val ready = state.engine as? EngineState.Ready
        val canSend = ready != null && ready.loaded.hasText && !state.isBusy
        send.isEnabled = canSend
        send.visibility = if (state.chat.answering) View.GONE else View.VISIBLE
        stop.visibility = if (state.chat.answering) View.VISIBLE else View.GONE
        forget.isEnabled = !state.isBusy && state.chat.messages.isNotEmpty()
        status.setTextIfNew(statusText(state))
        if (rows.messages !== state.chat.messages || rows.answering != state.chat.answering) {
            rows.messages = state.chat.messages
            rows.answering = state.chat.answering
            rows.notifyDataSetChanged()
        }
    }

    private fun statusText(state: AppState): String =
        when (val engine = state.engine) {
            EngineState.Stopped -> context.getString(R.string.chat_no_model)
            is EngineState.Opening -> context.getString(R.string.chat_opening, engine.model.name)
            is EngineState.Refused, is EngineState.Died -> context.getString(R.string.chat_no_engine)
            is EngineState.Ready -> {
                val speed = state.panel.speed
                when {
                    !engine.loaded.hasText -> context.getString(R.string.chat_no_text, engine.loaded.textError)
                    speed != null && state.isBusy -> context.getString(R.string.chat_speed, engine.model.name, speed)
                    else -> engine.model.name
                }
            }
        }

    private inner class Rows : BaseAdapter() {
        var messages: List<Message> = emptyList()
        var answering = false

        override fun getCount() = messages.size

        override fun getItem(position: Int) = messages[position]

        override fun getItemId(position: Int) = position.toLong()

        override fun getViewTypeCount() = Message.Author.values().size

        override fun getItemViewType(position: Int) = messages[position].author.ordinal

        override fun getView(position: Int, old: View?, parent: ViewGroup): View {
            val message = messages[position]
            val layout = if (message.author == Message.Author.PERSON) R.layout.row_person else R.layout.row_model_answer
            val view = old ?: LayoutInflater.from(context).inflate(layout, parent, false)
            val coming = answering && position == messages.lastIndex
            val text = if (coming && message.text.isEmpty()) context.getString(R.string.chat_thinking) else message.text
            view.findViewById<TextView>(R.id.message_text).text = text
            view.findViewById<TextView>(R.id.message_ending).apply {
                val ending = message.ending?.let(::endingText)
                visibility = if (ending == null) View.GONE else View.VISIBLE
                this.text = ending.orEmpty()
            }
            val author = if (message.author == Message.Author.PERSON) R.string.said_by_you else R.string.said_by_model
            view.contentDescription = context.getString(author, text)
            return view
        }
    }

    private fun endingText(ending: Ending): String =
        when (ending) {
            Ending.Cancelled -> context.getString(R.string.ending_cancelled)
            Ending.Length -> context.getString(R.string.ending_length)
            Ending.ContextFull -> context.getString(R.string.ending_context)
            Ending.EngineEnded -> context.getString(R.string.ending_engine)
            is Ending.Failed -> context.getString(R.string.ending_failed, ending.message)
        }
}
