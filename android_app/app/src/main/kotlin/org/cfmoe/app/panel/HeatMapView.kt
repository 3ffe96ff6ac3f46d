/** Which experts are in memory: a row per MoE layer, a cell per expert, the more colour the longer it has been there. */
package org.cfmoe.app.panel

import android.content.Context
import android.graphics.Canvas
import android.graphics.Paint
import android.util.AttributeSet
import android.view.View
import org.cfmoe.app.R

class HeatMapView(context: Context, attributes: AttributeSet?) : View(context, attributes) {
    private val cold = Paint().apply { color = context.getColor(R.color.heat_cold) }
    private val hot = Paint().apply { color = context.getColor(R.color.heat_hot) }
    private val rowHeight = resources.getDimension(R.dimen.heat_row)
    private val gap = resources.getDimension(R.dimen.heat_gap)

    /** Values in [0, 1]. */
    var heat: List<FloatArray> = emptyList()
        set(value) {
            val grown = value.size != field.size
            field = value
            if (grown) requestLayout()
            invalidate()
        }

    override fun onMeasure(widthMeasureSpec: Int, heightMeasureSpec: Int) {
        val height = (rowHeight * heat.size).toInt() + paddingTop + paddingBottom
        setMeasuredDimension(getDefaultSize(suggestedMinimumWidth, widthMeasureSpec), resolveSize(height, heightMeasureSpec))
    }

    override fun onDraw(canvas: Canvas) {
        super.onDraw(canvas)
        val width = (width - paddingLeft - paddingRight).toFloat()
        heat.forEachIndexed { layer, row ->
            val cell = width / maxOf(row.size, 1)
            val space = minOf(gap, cell / 4)
            val top = paddingTop + layer * rowHeight
            row.forEachIndexed { expert, value ->
                val left = paddingLeft + expert * cell
                canvas.drawRect(left, top, left + cell - space, top + rowHeight - gap, cold)
                if (value > 0) {
                    hot.alpha = (value * OPAQUE).toInt()
                    canvas.drawRect(left, top, left + cell - space, top + rowHeight - gap, hot)
                }
            }
        }
    }

    private companion object {
        const val OPAQUE = 255
    }
}
