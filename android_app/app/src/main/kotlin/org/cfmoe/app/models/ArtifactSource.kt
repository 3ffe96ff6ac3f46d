/** Where a model comes from: files with names, one after the other. */
package org.cfmoe.app.models

import java.io.BufferedInputStream
import java.io.InputStream
import java.util.zip.GZIPInputStream
import java.util.zip.ZipEntry
import java.util.zip.ZipException
import java.util.zip.ZipInputStream

/** `totalBytes` is what will be read, as far as it is known; it serves the progress only. */
interface ArtifactSource {
    val totalBytes: Long?

    /** Calls `visit` with each file's path and content. The content is read before `visit` returns, or not at all. */
    fun forEachFile(visit: (path: String, content: InputStream) -> Unit)
}

/** A zip, tar or gzipped tar archive; which of them its first bytes say. */
class ArchiveSource(override val totalBytes: Long?, private val open: () -> InputStream) : ArtifactSource {
    override fun forEachFile(visit: (path: String, content: InputStream) -> Unit) {
        BufferedInputStream(open(), BUFFER).use { stream ->
            when (kind(stream)) {
                Kind.ZIP -> zip(stream, visit)
                Kind.GZIP -> BufferedInputStream(GZIPInputStream(stream, BUFFER), BUFFER).use { inner ->
                    if (kind(inner) != Kind.TAR) throw ModelException("the gzip file holds no tar archive")
                    TarReader(inner).forEachFile(visit)
                }
                Kind.TAR -> TarReader(stream).forEachFile(visit)
                Kind.OTHER -> throw ModelException("the file is no zip, tar or tar.gz archive")
            }
        }
    }

    private fun zip(stream: InputStream, visit: (path: String, content: InputStream) -> Unit) {
        try {
            val archive = ZipInputStream(stream)
            while (true) {
                val entry: ZipEntry = archive.nextEntry ?: break
                if (!entry.isDirectory) visit(entry.name, archive)
            }
        } catch (error: ZipException) {
            throw ModelException("the zip archive is damaged: ${error.message}", error)
        } catch (error: IllegalArgumentException) {
            throw ModelException("the zip archive is damaged: a file name is not text", error)
        }
    }

    private enum class Kind { ZIP, GZIP, TAR, OTHER }

    private fun kind(stream: BufferedInputStream): Kind {
        stream.mark(TarReader.BLOCK)
        val head = ByteArray(TarReader.BLOCK)
        val size = stream.readFully(head)
        stream.reset()
        return when {
            size >= 4 && head[0] == 'P'.code.toByte() && head[1] == 'K'.code.toByte() -> Kind.ZIP
            size >= 2 && head[0] == 0x1f.toByte() && head[1] == 0x8b.toByte() -> Kind.GZIP
            size == TarReader.BLOCK && TarReader.isHeader(head) -> Kind.TAR
            else -> Kind.OTHER
        }
    }

    private companion object {
        const val BUFFER = 1 shl 16
    }
}

/** Reads until `into` is full or the stream ends; returns how much was read. */
internal fun InputStream.readFully(into: ByteArray): Int {
    var size = 0
    while (size < into.size) {
        val got = read(into, size, into.size - size)
        if (got < 0) break
        size += got
    }
    return size
}
