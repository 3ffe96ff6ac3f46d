/** The conversation: what was said, the answer as it comes, and the way to stop it. */
package org.cfmoe.app.chat

import android.content.ClipData
import android.content.ClipboardManager
import android.text.SpannableString
import android.text.Spanned
import android.text.style.ForegroundColorSpan
import android.view.LayoutInflater
import android.view.View
import android.view.ViewGroup
import android.widget.AbsListView
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
import org.cfmoe.app.state.Notice
import org.cfmoe.app.state.Screen
import org.cfmoe.app.state.isBusy
import org.cfmoe.app.state.modelOrNull

class ChatScreen(root: View, private val controller: AppController) {
    private val context = root.context
    private val rows = Rows()
    private var format = ChatFormat.PLAIN
    private val status: TextView = root.findViewById(R.id.chat_status)
    private val input: EditText = root.findViewById(R.id.chat_input)
    private val send: Button = root.findViewById(R.id.chat_send)
    private val stop: Button = root.findViewById(R.id.chat_stop)
    private val forget: Button = root.findViewById(R.id.chat_forget)
    private val mode: TextView = root.findViewById(R.id.chat_mode)
    private val settings: Button = root.findViewById(R.id.chat_settings)
    private val list: ListView = root.findViewById(R.id.chat_list)

    init {
        list.adapter = rows
        list.setOnScrollListener(object : AbsListView.OnScrollListener {
            override fun onScrollStateChanged(view: AbsListView, state: Int) {
                // An answer that grows is followed until a finger moves the list, and again when it is back at the end.
                if (state == AbsListView.OnScrollListener.SCROLL_STATE_TOUCH_SCROLL) follow(false)
                if (state == AbsListView.OnScrollListener.SCROLL_STATE_IDLE) follow(!list.canScrollVertically(1))
            }

            override fun onScroll(view: AbsListView, first: Int, visible: Int, total: Int) = Unit
        })
        list.setOnItemLongClickListener { _, _, position, _ ->
            copy(rows.messages[position].text)
            true
        }
        send.setOnClickListener {
            follow(true)
            controller.send(input.text.toString())
            input.text.clear()
        }
        settings.setOnClickListener { controller.choose(Screen.SETTINGS) }
        stop.setOnClickListener { controller.cancelAnswer() }
        forget.setOnClickListener { controller.forgetConversation() }
    }

    fun show(state: AppState) {
        val ready = state.engine as? EngineState.Ready
        format = state.engine.modelOrNull?.chat ?: ChatFormat.PLAIN
        val canSend = ready != null && ready.loaded.hasText && !state.isBusy
        send.isEnabled = canSend
        send.visibility = if (state.chat.answering) View.GONE else View.VISIBLE
        stop.visibility = if (state.chat.answering) View.VISIBLE else View.GONE
        forget.isEnabled = !state.isBusy && state.chat.messages.isNotEmpty()
        settings.isEnabled = ready != null
        status.setTextIfNew(statusText(state))
        val continues = ready != null && ready.model.chat == null
        mode.visibility = if (continues) View.VISIBLE else View.GONE
        if (ready != null && continues) mode.setTextIfNew(continuesText(ready.model.chatAbsent))
        input.hint = context.getString(if (continues) R.string.chat_hint_text else R.string.chat_hint)
        if (rows.messages !== state.chat.messages || rows.answering != state.chat.answering || rows.idle != canSend) {
            rows.messages = state.chat.messages
            rows.answering = state.chat.answering
            rows.idle = canSend
            rows.notifyDataSetChanged()
        }
    }

    private fun continuesText(absent: String): String =
        if (absent.isEmpty()) context.getString(R.string.chat_continues) else context.getString(R.string.chat_continues_why, absent)

    private fun follow(follows: Boolean) {
        list.transcriptMode = if (follows) AbsListView.TRANSCRIPT_MODE_ALWAYS_SCROLL else AbsListView.TRANSCRIPT_MODE_DISABLED
    }

    private fun copy(text: String) {
        val clip = ClipData.newPlainText(context.getString(R.string.app_name), text)
        context.getSystemService(ClipboardManager::class.java).setPrimaryClip(clip)
        controller.tell(Notice.Copied)
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
        var idle = false

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
            view.findViewById<TextView>(R.id.message_text).text = if (message.author == Message.Author.MODEL) quietThoughts(text) else text
            view.findViewById<TextView>(R.id.message_ending).apply {
                val ending = noteText(message)
                visibility = if (ending == null) View.GONE else View.VISIBLE
                this.text = ending.orEmpty()
            }
            if (message.author == Message.Author.MODEL) showActions(view, message, coming, position == messages.lastIndex)
            val author = if (message.author == Message.Author.PERSON) R.string.said_by_you else R.string.said_by_model
            view.contentDescription = context.getString(author, text)
            return view
        }
    }

    private fun showActions(view: View, message: Message, coming: Boolean, last: Boolean) {
        val full = message.ending == Ending.ContextFull || message.ending == Ending.TooLong
        fun button(id: Int, shown: Boolean, action: () -> Unit) =
            view.findViewById<Button>(id).run {
                visibility = if (shown) View.VISIBLE else View.GONE
                setOnClickListener { action() }
            }
        view.findViewById<View>(R.id.message_actions).visibility = if (coming) View.GONE else View.VISIBLE
        val said = message.text.drop(format.thoughtLength(message.text)).trim().ifEmpty { message.text }
        button(R.id.message_copy, message.text.isNotEmpty()) { copy(said) }
        button(R.id.message_again, last && rows.idle && !full) {
            follow(true)
            controller.answerAgain()
        }
        button(R.id.message_new, last && full) { controller.forgetConversation() }
    }

    private fun quietThoughts(text: String): CharSequence {
        val length = format.thoughtLength(text)
        if (length == 0) return text
        val quiet = ForegroundColorSpan(context.getColor(R.color.text_quiet))
        return SpannableString(text).apply { setSpan(quiet, 0, length, Spanned.SPAN_EXCLUSIVE_EXCLUSIVE) }
    }

    /** Why the answer ended, and how fast it came. */
    private fun noteText(message: Message): String? {
        val ending = message.ending?.let(::endingText)
        val speed = message.speed?.let { context.getString(R.string.tokens_per_second, it) }
        return if (ending != null && speed != null) context.getString(R.string.ending_speed, ending, speed) else ending ?: speed
    }

    private fun endingText(ending: Ending): String =
        when (ending) {
            Ending.Cancelled -> context.getString(R.string.ending_cancelled)
            Ending.Length -> context.getString(R.string.ending_length)
            Ending.ContextFull -> context.getString(R.string.ending_context)
            Ending.TooLong -> context.getString(R.string.ending_too_long)
            Ending.EngineEnded -> context.getString(R.string.ending_engine)
            is Ending.Failed -> context.getString(R.string.ending_failed, ending.message)
        }
}
