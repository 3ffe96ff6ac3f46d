/** Copies a model from a source into the library: every byte is digested on the way, and all of it verified before it is listed. */
package org.cfmoe.app.models

import java.io.EOFException
import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.io.InputStream
import java.security.MessageDigest
import java.util.concurrent.atomic.AtomicBoolean
import java.util.zip.ZipException

/** `total` is null where it is not known. `sha256` is that of the last file that is complete. */
data class ImportProgress(val file: String, val done: Long, val total: Long?, val checkedFile: String = "", val sha256: String = "")

/** The person asked for the end of an import. */
class ImportCancelled : Exception()

class Importer(
    private val library: ModelLibrary,
    private val cancelled: AtomicBoolean,
    private val onProgress: (ImportProgress) -> Unit,
) {
    private val digests = HashMap<String, FileFacts>() // by path in the source
    private var done = 0L
    private var checkedFile = ""
    private var lastDigest = ""
    private var reportedAt = 0L

    /** Returns the model. Raises ModelException or ImportCancelled; the library is as before then. */
    fun import(source: ArtifactSource, bundled: Boolean = false): ModelEntry {
        val staged = library.stage()
        try {
            source.forEachFile { path, content -> copy(staged, safePath(path.removePrefix("./")), content, source.totalBytes) }
            val model = verified(staged)
            return library.adopt(model, bundled)
        } catch (error: ZipException) {
            throw ModelException("the archive is damaged: ${error.message}", error)
        } catch (error: EOFException) {
            throw ModelException("the archive ends too early", error)
        } catch (error: IOException) {
            throw ModelException("the model cannot be copied: ${error.message}", error)
        } finally {
            staged.deleteRecursively()
        }
    }

    private fun copy(staged: File, path: String, content: InputStream, total: Long?) {
        if (digests.size >= MAX_FILES) throw ModelException("more than $MAX_FILES files: this is no artifact")
        val target = File(staged, path)
        if (!target.canonicalPath.startsWith(staged.canonicalPath + File.separator)) throw ModelException("$path leads out of the model")
        if (target.exists()) throw ModelException("$path comes twice")
        val directory = target.parentFile ?: staged
        if (!directory.isDirectory && !directory.mkdirs()) throw ModelException("$path stands below a file")
        val digest = MessageDigest.getInstance("SHA-256")
        var size = 0L
        FileOutputStream(target).use { out ->
            val buffer = ByteArray(BUFFER)
            while (true) {
                if (cancelled.get()) throw ImportCancelled()
                val got = content.read(buffer)
                if (got < 0) break
                if (library.spaceLeft() < got + SPACE_KEPT) throw ModelException("the phone has no room for this model: free some")
                out.write(buffer, 0, got)
                digest.update(buffer, 0, got)
                size += got
                done += got
                report(path, total, false)
            }
            out.fd.sync()
        }
        lastDigest = hexadecimal(digest.digest())
        checkedFile = path
        digests[path] = FileFacts(size, lastDigest)
        report(path, total, true)
    }

    /** The directory below `staged` that holds the artifact, with nothing beside its files, once every digest was found right. */
    private fun verified(staged: File): File {
        val manifests = digests.keys.filter { it == Manifest.FILE || it.endsWith("/" + Manifest.FILE) }
        val found = manifests.minByOrNull { path -> path.count { it == '/' } }
            ?: throw ModelException("there is no ${Manifest.FILE}: choose the artifact's own directory or an archive of it")
        val prefix = found.removeSuffix(Manifest.FILE)
        val manifest = Manifest.parse(File(staged, found).readText())
        for ((path, facts) in manifest.files) {
            val got = digests[prefix + path] ?: throw ModelException("$path is missing")
            if (got.size != facts.size) throw ModelException("$path has ${got.size} bytes, not ${facts.size}: it is damaged or cut off")
            if (got.sha256 != facts.sha256) throw ModelException("$path is damaged: its SHA-256 is ${got.sha256}, not ${facts.sha256}")
        }
        val wanted = manifest.files.keys.map { prefix + it } + found
        (digests.keys - wanted.toSet()).forEach { File(staged, it).delete() }
        return File(staged, prefix)
    }

    private fun report(path: String, total: Long?, always: Boolean) {
        val now = System.nanoTime()
        if (!always && now - reportedAt < REPORT_NANOS) return
        reportedAt = now
        onProgress(ImportProgress(path, done, total, checkedFile, lastDigest))
    }

    private companion object {
        const val BUFFER = 1 shl 18
        const val MAX_FILES = 10_000
        const val SPACE_KEPT = 64L shl 20 // bytes that an import leaves to the phone
        const val REPORT_NANOS = 100_000_000L
    }
}
