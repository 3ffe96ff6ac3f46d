/** Requests become the lines that docs/serve-stdio.md has, and only its events are taken. */
package org.cfmoe.app.engine

import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertNull
import org.junit.Assert.assertThrows
import org.junit.Test

class WireTest {
    @Test
    fun requestsSayWhatWasAskedForAndNothingElse() {
        val load = Wire.load(LoadRequest("/a b", Budget.Percent(25.0)))
        assertEquals(setOf("op", "artifact", "expert_percent", "prefill_device", "decode_device"), load.keys().asSequence().toSet())
        assertEquals(25.0, load.getDouble("expert_percent"), 0.0)
        val everything = Wire.load(LoadRequest("/a", placement = Placement("vulkan", "cpu")))
        assertEquals("vulkan", everything.getString("prefill_device"))
        assertEquals(setOf("op", "artifact", "prefill_device", "decode_device"), everything.keys().asSequence().toSet())
        val generate = Wire.generate(GenerateRequest(tokens = intArrayOf(1, 2), stopTokens = IntArray(0), reset = true))
        assertEquals("[1,2]", generate.getJSONArray("tokens").toString())
        assertEquals(0, generate.getJSONArray("stop_tokens").length())
        assertEquals(false, generate.has("prompt"))
        assertEquals(false, generate.has("position"))
        assertEquals(true, Wire.reset(true).getBoolean("keep_experts"))
        assertEquals(setOf("op"), Wire.reset(false).keys().asSequence().toSet())
        val prompt = listOf(Piece("<b>", false), Piece("x", true))
        val pieces = Wire.generate(GenerateRequest(pieces = prompt, topK = 5, repetitionPenalty = 1.5, position = 3))
        assertEquals(3, pieces.getInt("position"))
        assertEquals("""[{"text":"<b>"},{"text":"x","typed":true}]""", pieces.getJSONArray("prompt").toString())
        assertEquals(5, pieces.getInt("top_k"))
        assertEquals(1.5, pieces.getDouble("repetition_penalty"), 0.0)
        assertEquals(77L, Wire.setBudget(Budget.Bytes(77)).getLong("memory_budget"))
        assertEquals(0L, Wire.trim(0).getLong("memory_budget"))
    }

    @Test
    fun devicesGiveWhatCanBeChosen() {
        val plain = Wire.greeting("""{"event": "ready", "protocol": 1, "version": "1", "abi": 4, "policies": "lru, lfu"}""")
        assertEquals(listOf("lru", "lfu"), plain.policies)
        val one = Wire.event("""{"id": 1, "event": "devices", "devices": {"opencl": []}}""") as Event.Devices
        assertEquals(listOf(Device.CPU), one.devices)
        assertEquals(listOf(Placement.CPU), Placement.of(one.devices))
        val line = """{"id": 1, "event": "devices", "devices": {"vulkan": [{"name": "A GPU"}, {"name": "B"}]}}"""
        val two = Wire.event(line) as Event.Devices
        assertEquals(listOf(Device.CPU, Device("vulkan", "A GPU")), two.devices)
        assertEquals(listOf(Placement.CPU, Placement("vulkan", "vulkan"), Placement("vulkan", "cpu")), Placement.of(two.devices))
    }

    @Test
    fun eventsAreRead() {
        assertEquals(Event.Token(3, 262, " a"), Wire.event("""{"id": 3, "event": "token", "token": 262, "text": " a"}"""))
        assertNull((Wire.event("""{"id": 3, "event": "token", "token": 262}""") as Event.Token).text)
        val failed = Wire.event("""{"id": null, "event": "error", "kind": "user", "message": "no"}""") as Event.Failed
        assertEquals(EngineError(EngineError.Kind.USER, "no"), failed.error)
        assertNull(failed.id)
        val phase = """{"tokens": 2, "seconds": 0.5, "tokens_per_s": 4.0, "hits": 3, "misses": 1, "chr": 0.75, "prefetched": 0,
            "bytes_read": 4096, "stall_ms": 1.5}"""
        val memory = """{"budget_bytes": 9000000000, "smallest_budget_bytes": 1, "largest_budget_bytes": 2, "weights_bytes": 3,
            "kv_bytes": 4, "workspace_bytes": 5, "pool_bytes": 6, "arena_bytes": 7, "mapped_bytes": 0, "expert_slots": 8,
            "expert_total": 9, "rss_bytes": 10, "peak_rss_bytes": 11}"""
        val report = Wire.event(
            """{"id": 1, "event": "metrics", "loaded": true, "position": 4, "residents": ["01", "10"], "memory": $memory,
                "metrics": {"prefill": $phase, "decode": $phase, "first_32_hits": 0, "first_32_accesses": 0}}""",
        ) as Event.Report
        assertEquals(9_000_000_000L, report.memory?.budget)
        assertEquals(0.75, report.metrics?.decode?.hitRate ?: 0.0, 0.0)
        assertArrayEquals(booleanArrayOf(true, false), report.residents?.get(1))
        val empty = Wire.event("""{"id": 1, "event": "metrics", "loaded": false, "rss_bytes": 5}""") as Event.Report
        assertNull(empty.metrics)
    }

    @Test
    fun whatIsNoEventIsRefused() {
        val bad = listOf(
            "", "garbage", "[]", "{}", "null", """{"id": 1}""", """{"id": 1, "event": "dance"}""", """{"id": "x", "event": "ok"}""",
            """{"id": 1, "event": "token"}""", """{"id": 1, "event": "token", "token": "no"}""",
            """{"id": 1, "event": "error", "kind": "odd", "message": ""}""", """{"id": 1, "event": "done", "finish_reason": "bored"}""",
            """{"id": 1, "event": "budget", "memory": {}}""", """{"id": 99999999999, "event": "ok"}""",
        )
        for (line in bad) assertThrows(line, ProtocolException::class.java) { Wire.event(line) }
        assertThrows(ProtocolException::class.java) {
            Wire.greeting("""{"event": "ready", "protocol": 2, "version": "1", "abi": 4, "policies": ""}""")
        }
        assertThrows(ProtocolException::class.java) { Wire.greeting("""{"id": 1, "event": "ok"}""") }
    }

    @Test
    fun linesAreCutAtNewlinesOnly() {
        val text = "a\u2028b\r\n\nlong" + "x".repeat(100_000) + "\nhalf"
        val lines = LineReader(text.byteInputStream(), 200_000)
        assertEquals("a\u2028b\r", lines.next())
        assertEquals("", lines.next())
        assertEquals(100_004, lines.next()?.length)
        assertNull(lines.next())
        assertThrows(ProtocolException::class.java) { LineReader("x".repeat(200_000).byteInputStream(), 100_000).next() }
    }
}
