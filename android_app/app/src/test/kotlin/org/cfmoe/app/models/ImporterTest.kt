/** Archives and directories, whole and hostile: what is imported is verified, what is not leaves nothing. */
package org.cfmoe.app.models

import java.io.ByteArrayInputStream
import java.io.ByteArrayOutputStream
import java.io.File
import java.io.InputStream
import java.security.MessageDigest
import java.util.concurrent.CopyOnWriteArrayList
import java.util.concurrent.atomic.AtomicBoolean
import java.util.zip.GZIPOutputStream
import java.util.zip.ZipEntry
import java.util.zip.ZipOutputStream
import org.cfmoe.app.DirectorySource
import org.json.JSONObject
import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertThrows
import org.junit.Assert.assertTrue
import org.junit.Before
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

class ImporterTest {
    @get:Rule
    val folder = TemporaryFolder()

    private lateinit var root: File
    private lateinit var library: ModelLibrary
    private val seen = CopyOnWriteArrayList<ImportProgress>()
    private val weights = ByteArray(300_000) { (it * 31).toByte() }
    private val longName = "lib/" + "deep/".repeat(30) + "plan.json"
    private val files = linkedMapOf("weights.bin" to weights, "empty.txt" to ByteArray(0), longName to "{}".toByteArray())

    @Before
    fun begin() {
        root = folder.newFolder("models")
        library = ModelLibrary(root)
    }

    private fun manifest(files: Map<String, ByteArray> = this.files): ByteArray {
        val rows = JSONObject()
        for ((name, content) in files) {
            rows.put(name, JSONObject().put("size", content.size).put("sha256", sha256(content)).put("xxh3_64", "0"))
        }
        val model = JSONObject().put("name", "tiny/é").put("parameters", 5).put("num_layers", 2).put("num_experts", 4)
        return JSONObject().put("format", "cfmoe-artifact").put("format_version", 1).put("model", model).put("files", rows)
            .toString().toByteArray()
    }

    private fun all(): Map<String, ByteArray> = files + (Manifest.FILE to manifest())

    private fun zip(entries: Map<String, ByteArray>): ByteArray {
        val out = ByteArrayOutputStream()
        ZipOutputStream(out).use { zip ->
            for ((name, content) in entries) {
                zip.putNextEntry(ZipEntry(name))
                zip.write(content)
                zip.closeEntry()
            }
        }
        return out.toByteArray()
    }

    /** As GNU tar writes it: a name of more than 100 bytes comes before its file, in an entry of type L. */
    private fun tar(entries: Map<String, ByteArray>, type: Char = '0'): ByteArray {
        val out = ByteArrayOutputStream()
        fun entry(name: String, content: ByteArray, kind: Char) {
            val header = ByteArray(TarReader.BLOCK)
            fun put(offset: Int, text: String) = text.toByteArray().copyInto(header, offset)
            put(0, name.take(100))
            put(124, "%011o".format(content.size))
            header[156] = kind.code.toByte()
            put(257, "ustar\u000000")
            put(148, " ".repeat(8))
            put(148, "%06o\u0000 ".format(header.sumOf { it.toInt() and 0xff }))
            out.write(header)
            out.write(content)
            out.write(ByteArray(-content.size and 511))
        }
        for ((name, content) in entries) {
            if (name.length > 100) entry("././@LongLink", (name + "\u0000").toByteArray(), 'L')
            entry(name, content, type)
        }
        out.write(ByteArray(2 * TarReader.BLOCK))
        return out.toByteArray()
    }

    private fun gzip(data: ByteArray): ByteArray {
        val out = ByteArrayOutputStream()
        GZIPOutputStream(out).use { it.write(data) }
        return out.toByteArray()
    }

    private fun sha256(data: ByteArray): String = hexadecimal(MessageDigest.getInstance("SHA-256").digest(data))

    private fun source(archive: ByteArray) = ArchiveSource(archive.size.toLong()) { ByteArrayInputStream(archive) }

    private fun import(source: ArtifactSource, cancelled: AtomicBoolean = AtomicBoolean(), bundled: Boolean = false): ModelEntry =
        Importer(library, cancelled) { seen += it }.import(source, bundled)

    private fun refused(source: ArtifactSource): String {
        val message = assertThrows(ModelException::class.java) { import(source) }.message.orEmpty()
        assertEquals("nothing is left", emptyList<String>(), root.list().orEmpty().toList())
        return message
    }

    private fun check(model: ModelEntry) {
        assertEquals("tiny/é", model.name)
        assertEquals(listOf(model), library.list())
        val present = model.directory.walk().filter { it.isFile }.map { it.relativeTo(model.directory).path }.toSet()
        assertEquals(all().keys, present)
        assertArrayEquals(weights, File(model.directory, "weights.bin").readBytes())
        assertEquals(listOf(model.id), root.list().orEmpty().toList())
    }

    @Test
    fun archivesOfEveryKindAreImported() {
        val below = all().mapKeys { "some/model/" + it.key }
        val dotted = all().mapKeys { "./" + it.key }
        for (archive in listOf(zip(all()), tar(all()), gzip(tar(all())), zip(below), tar(dotted))) {
            val model = import(source(archive))
            check(model)
            library.delete(model)
            assertEquals(emptyList<ModelEntry>(), library.list())
        }
        assertEquals(sha256(weights), seen.first { it.checkedFile.endsWith("weights.bin") }.sha256)
        assertTrue(seen.zipWithNext().none { (a, b) -> a.file == b.file && a.done > b.done })
    }

    @Test
    fun directoriesAreImportedOnceAndWithoutWhatDoesNotBelong() {
        val directory = folder.newFolder("picked")
        for ((name, content) in all() + ("notes.txt" to "mine".toByteArray())) {
            File(directory, name).apply { parentFile.mkdirs() }.writeBytes(content)
        }
        val model = import(DirectorySource(directory), bundled = true)
        check(model)
        assertTrue(model.bundled)
        assertEquals(model, import(DirectorySource(directory), bundled = true))
        assertEquals(model, library.find(manifest(), bundled = true))
        assertEquals(null, library.find(manifest(), bundled = false))
    }

    @Test
    fun archivesThatLeadOutAreRefused() {
        for (name in listOf("../evil", "/etc/evil", "a/../../evil", "a//b", "a\\b", "a/./b", "..", "bad\nname")) {
            assertTrue(name, "leads out" in refused(source(zip(mapOf(name to weights) + all()))))
            assertTrue(name, "leads out" in refused(source(tar(mapOf(name to weights) + all()))))
        }
        assertFalse(File(root.parentFile, "evil").exists())
        assertTrue("link" in refused(source(tar(mapOf("weights.bin" to ByteArray(0)), type = '2'))))
        val outside = manifest(mapOf("../outside" to ByteArray(0)))
        assertTrue("leads out" in refused(source(zip(mapOf(Manifest.FILE to outside)))))
    }

    @Test
    fun damageIsFound() {
        val flipped = weights.clone().also { it[1000] = (it[1000] + 1).toByte() }
        assertTrue("SHA-256" in refused(source(zip(all() + ("weights.bin" to flipped)))))
        assertTrue("bytes, not" in refused(source(zip(all() + ("weights.bin" to weights.copyOf(10))))))
        assertTrue("missing" in refused(source(zip(all() - "weights.bin"))))
        assertTrue("no manifest.json" in refused(source(zip(files))))
        assertTrue("not that of" in refused(source(zip(mapOf(Manifest.FILE to "{}".toByteArray())))))
        assertTrue("no zip" in refused(source("hello".toByteArray())))
        assertTrue("no zip" in refused(source(ByteArray(0))))
        assertTrue("no tar" in refused(source(gzip(weights))))
        for (archive in listOf(zip(all()), tar(all()), gzip(tar(all())))) {
            for (size in listOf(archive.size / 3, archive.size / 2)) refused(source(archive.copyOf(size)))
        }
        val header = tar(all()).also { it[124] = 'x'.code.toByte() }
        refused(source(header))
    }

    @Test
    fun cancelLeavesNothing() {
        val cancelled = AtomicBoolean()
        val slow = object : ArtifactSource {
            override val totalBytes = null

            override fun forEachFile(visit: (path: String, content: InputStream) -> Unit) =
                visit("weights.bin", object : InputStream() {
                    private var given = 0

                    override fun read(): Int {
                        if (++given > 600_000) cancelled.set(true)
                        return 7
                    }
                })
        }
        assertThrows(ImportCancelled::class.java) { import(slow, cancelled) }
        assertEquals(emptyList<String>(), root.list().orEmpty().toList())
    }

    @Test
    fun whatAKilledImportLeftIsSwept() {
        val left = library.stage()
        File(left, "weights.bin").writeBytes(weights)
        assertEquals(emptyList<ModelEntry>(), library.list())
        library.sweep()
        assertFalse(left.exists())
    }
}
