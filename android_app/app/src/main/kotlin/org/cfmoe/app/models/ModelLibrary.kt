/** The models on this phone: a directory each, which appears under its name only when complete and verified. */
package org.cfmoe.app.models

import java.io.File
import java.io.IOException
import java.security.MessageDigest
import org.cfmoe.app.chat.ChatFormat
import org.cfmoe.app.chat.GenerationSettings

/** `id` is the directory's name. `bundled`: it came with the app. `recommended` is what its authors do. */
data class ModelEntry(
    val id: String,
    val name: String,
    val directory: File,
    val bytes: Long,
    val parameters: Long,
    val layers: Int,
    val experts: Int,
    val bundled: Boolean,
    val chat: ChatFormat? = null,
    val chatAbsent: String = "",
    val recommended: GenerationSettings = GenerationSettings(),
)

/** Not for several threads at a time, but for `list`. */
class ModelLibrary(private val root: File) {
    /** Complete models, bundled ones first, then by name. */
    fun list(): List<ModelEntry> =
        root.listFiles().orEmpty()
            .filter { it.isDirectory && !it.name.startsWith(STAGED) }
            .mapNotNull(::entry)
            .sortedWith(compareBy({ !it.bundled }, { it.name }))

    private fun entry(directory: File): ModelEntry? =
        try {
            val manifest = Manifest.parse(File(directory, Manifest.FILE).readText())
            ModelEntry(
                directory.name,
                manifest.name,
                directory,
                manifest.totalBytes,
                manifest.parameters,
                manifest.layers,
                manifest.experts,
                directory.name.startsWith(BUNDLED),
                manifest.chat,
                manifest.chatAbsent,
                GenerationSettings.recommended(File(directory, "generation_config.json")),
            )
        } catch (_: IOException) {
            null // no model: something else stands in the directory, which `sweep` leaves alone
        } catch (_: ModelException) {
            null
        }

    fun delete(model: ModelEntry) {
        // Renamed first: a model that is half gone must not be listed.
        val doomed = File(root, STAGED + "old-" + model.id)
        doomed.deleteRecursively()
        if (!model.directory.renameTo(doomed) || !doomed.deleteRecursively()) throw ModelException("${model.name} cannot be deleted")
    }

    /** Removes what an import left that was killed. Not while one runs. */
    fun sweep() {
        root.listFiles().orEmpty().filter { it.name.startsWith(STAGED) }.forEach { it.deleteRecursively() }
    }

    /** The directory of the model with this manifest, if it is here. */
    fun find(manifest: ByteArray, bundled: Boolean): ModelEntry? =
        try {
            File(root, idOf(manifest, bundled)).takeIf { it.isDirectory }?.let(::entry)
        } catch (_: ModelException) {
            null
        }

    internal fun stage(): File {
        val directory = File(root, STAGED + "new-" + System.nanoTime().toString(36))
        if (!directory.mkdirs()) throw ModelException("${root.path} cannot be written")
        return directory
    }

    internal fun spaceLeft(): Long = root.usableSpace

    /** Puts a verified directory in its place. */
    internal fun adopt(staged: File, bundled: Boolean): ModelEntry {
        val manifest = File(staged, Manifest.FILE).readBytes()
        val place = File(root, idOf(manifest, bundled))
        if (!place.exists() && !staged.renameTo(place)) throw ModelException("${place.path} cannot be written")
        return entry(place) ?: throw ModelException("${place.path} holds something else: delete it")
    }

    private fun idOf(manifest: ByteArray, bundled: Boolean): String {
        val name = Manifest.parse(String(manifest, Charsets.UTF_8)).name.map { if (it.isLetterOrDigit() && it < '\u007f') it else '-' }
        val digest = hexadecimal(MessageDigest.getInstance("SHA-256").digest(manifest)).take(16)
        return (if (bundled) BUNDLED else "") + name.joinToString("").take(40) + "-" + digest
    }

    private companion object {
        const val STAGED = ".cfmoe-"
        const val BUNDLED = "bundled-"
    }
}

fun hexadecimal(bytes: ByteArray): String = bytes.joinToString("") { "%02x".format(it) }
