/** What the expert cache does, while it does it, and the two things that can be changed: budget and device. */
package org.cfmoe.app.panel

import android.app.ActivityManager
import android.content.Context
import android.text.format.Formatter
import android.view.View
import android.widget.AdapterView
import android.widget.ArrayAdapter
import android.widget.SeekBar
import android.widget.Spinner
import android.widget.TextView
import org.cfmoe.app.AppController
import org.cfmoe.app.R
import org.cfmoe.app.engine.Device
import org.cfmoe.app.engine.Memory
import org.cfmoe.app.engine.Phase
import org.cfmoe.app.engine.Placement
import org.cfmoe.app.setTextIfNew
import org.cfmoe.app.state.AppState
import org.cfmoe.app.state.EngineState
import org.cfmoe.app.state.PanelState
import org.cfmoe.app.state.isBusy

/** Bytes for people. */
fun size(context: Context, bytes: Long): String = Formatter.formatShortFileSize(context, bytes)

class PanelScreen(private val root: View, private val controller: AppController) {
    private val context = root.context
    private val slider: SeekBar = root.findViewById(R.id.budget_slider)
    private val budgetText: TextView = root.findViewById(R.id.budget_text)
    private val deviceSpinner: Spinner = root.findViewById(R.id.device_choice)
    private val heatMap: HeatMapView = root.findViewById(R.id.heat_map)
    private val memoryBar: MemoryBarView = root.findViewById(R.id.memory_bar)
    private var scale = BudgetScale(0, 0)
    private var sliding = false
    private var devices: List<Device> = emptyList()
    private var placements: List<Placement> = emptyList()
    private var placementInUse: Placement? = null

    init {
        slider.max = BudgetScale.STEPS
        slider.setOnSeekBarChangeListener(object : SeekBar.OnSeekBarChangeListener {
            override fun onProgressChanged(bar: SeekBar, position: Int, fromUser: Boolean) {
                if (!fromUser) return
                budgetText.text = context.getString(R.string.budget_wanted, size(context, scale.bytes(position)))
                controller.setBudget(scale.bytes(position))
            }

            override fun onStartTrackingTouch(bar: SeekBar) {
                sliding = true
            }

            override fun onStopTrackingTouch(bar: SeekBar) {
                sliding = false
                controller.setBudget(scale.bytes(bar.progress))
            }
        })
        deviceSpinner.onItemSelectedListener = object : AdapterView.OnItemSelectedListener {
            override fun onItemSelected(parent: AdapterView<*>, view: View?, position: Int, id: Long) {
                val chosen = placements.getOrNull(position) ?: return
                if (placementInUse != null && chosen != placementInUse) controller.restart(chosen)
            }

            override fun onNothingSelected(parent: AdapterView<*>) = Unit
        }
    }

    fun show(state: AppState) {
        val ready = state.engine as? EngineState.Ready
        showBudget(ready?.memory)
        showDevices(ready, state.isBusy)
        showSpeed(state.panel)
        showHeat(state.panel)
    }

    private fun showBudget(memory: Memory?) {
        slider.isEnabled = memory != null
        memoryBar.memory = memory
        if (memory == null) {
            budgetText.setTextIfNew(context.getString(R.string.panel_no_model))
            return
        }
        if (!sliding) {
            scale = BudgetScale.of(memory.smallestBudget, memory.largestBudget, memory.budget, memory.resident, available())
            slider.progress = scale.position(memory.budget)
            val experts = context.getString(R.string.budget_experts, memory.expertSlots, memory.expertTotal)
            budgetText.setTextIfNew(context.getString(R.string.budget_now, size(context, memory.budget), experts))
        }
        val text = context.getString(R.string.memory_now, size(context, memory.resident), size(context, memory.budget))
        memoryBar.contentDescription = text
        value(R.id.value_memory, text)
    }

    /** Bytes that Android could give before it would begin to end apps. */
    private fun available(): Long {
        val info = ActivityManager.MemoryInfo()
        context.getSystemService(ActivityManager::class.java).getMemoryInfo(info)
        return maxOf(info.availMem - info.threshold, 0)
    }

    private fun showDevices(ready: EngineState.Ready?, busy: Boolean) {
        placementInUse = ready?.loaded?.placement
        val now = ready?.devices.orEmpty()
        if (now != devices) {
            devices = now
            placements = Placement.of(now)
            val adapter = ArrayAdapter(context, android.R.layout.simple_spinner_item, placements.map(::placementText))
            adapter.setDropDownViewResource(android.R.layout.simple_spinner_dropdown_item)
            deviceSpinner.adapter = adapter
        }
        val used = placements.indexOf(placementInUse)
        if (used >= 0 && used != deviceSpinner.selectedItemPosition) deviceSpinner.setSelection(used)
        deviceSpinner.isEnabled = placements.size > 1 && !busy
    }

    private fun placementText(placement: Placement): String =
        if (placement.prefill == placement.decode) {
            deviceText(placement.decode)
        } else {
            context.getString(R.string.device_two, deviceText(placement.prefill), deviceText(placement.decode))
        }

    private fun deviceText(kind: String): String {
        val name = devices.first { it.kind == kind }.name
        return if (name.isEmpty()) kind else context.getString(R.string.device_named, kind, name)
    }

    private fun showSpeed(panel: PanelState) {
        val none = context.getString(R.string.no_value)
        val metrics = panel.metrics
        value(R.id.value_speed, panel.speed?.let { context.getString(R.string.tokens_per_second, it) } ?: none)
        value(R.id.value_prefill_speed, metrics?.prefill?.let(::speed) ?: none)
        value(R.id.value_decode_speed, metrics?.decode?.let(::speed) ?: none)
        value(R.id.value_prefill_hits, metrics?.prefill?.let(::hits) ?: none)
        value(R.id.value_decode_hits, metrics?.decode?.let(::hits) ?: none)
        value(R.id.value_flash, metrics?.decode?.takeIf { it.tokens > 0 }?.let { size(context, it.bytesRead / it.tokens) } ?: none)
        val stall = metrics?.decode?.takeIf { it.tokens > 0 }?.let { it.stallMillis / it.tokens }
        value(R.id.value_stall, stall?.let { context.getString(R.string.millis, it) } ?: none)
    }

    private fun speed(phase: Phase): String? =
        if (phase.tokens == 0L) null else context.getString(R.string.tokens_per_second, phase.tokensPerSecond)

    private fun hits(phase: Phase): String? =
        if (phase.hits + phase.misses == 0L) null else context.getString(R.string.percent, phase.hitRate * 100)

    private fun showHeat(panel: PanelState) {
        heatMap.heat = panel.heat
        val present = panel.residents.sumOf { row -> row.count { it } }
        val all = panel.residents.sumOf { it.size }
        val text = context.resources.getQuantityString(R.plurals.heat_text, panel.residents.size, present, all, panel.residents.size)
        heatMap.contentDescription = text
        root.findViewById<TextView>(R.id.heat_text).setTextIfNew(text)
    }

    private fun value(id: Int, text: String) = root.findViewById<TextView>(id).setTextIfNew(text)
}
