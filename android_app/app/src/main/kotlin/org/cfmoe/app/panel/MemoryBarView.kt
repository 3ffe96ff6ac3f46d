/** The engine's memory against its budget: the parts of the budget as a stack, and a mark where the system's own figure lies. */
package org.cfmoe.app.panel

import android.content.Context
import android.graphics.Canvas
import android.graphics.Paint
import android.util.AttributeSet
import android.view.View
import org.cfmoe.app.R
import org.cfmoe.app.engine.Memory

class MemoryBarView(context: Context, attributes: AttributeSet?) : View(context, attributes) {
    private val ground = paint(R.color.memory_ground)
    private val parts = listOf(R.color.memory_weights, R.color.memory_conversation, R.color.memory_experts).map(::paint)
    private val mark = paint(R.color.memory_resident)
    private val markWidth = resources.getDimension(R.dimen.memory_mark)

    var memory: Memory? = null
        set(value) {
            field = value
            invalidate()
        }

    override fun onDraw(canvas: Canvas) {
        super.onDraw(canvas)
        val height = height.toFloat()
        canvas.drawRect(0f, 0f, width.toFloat(), height, ground)
        val memory = memory ?: return
        val full = maxOf(memory.largestBudget, memory.resident, 1).toFloat()
        var left = 0f
        listOf(memory.weights, memory.kv + memory.workspace + memory.arena, memory.pool).zip(parts).forEach { (bytes, paint) ->
            val right = left + width * (bytes / full)
            canvas.drawRect(left, 0f, right, height, paint)
            left = right
        }
        val at = minOf(width * (memory.resident / full), width - markWidth)
        canvas.drawRect(at, 0f, at + markWidth, height, mark)
    }

    private fun paint(color: Int) = Paint().apply { this.color = context.getColor(color) }
}
