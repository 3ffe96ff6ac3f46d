/** The files in a tar archive (POSIX ustar, with GNU's and pax's long names). Links and devices are refused. */
package org.cfmoe.app.models

import java.io.InputStream

class TarReader(private val stream: InputStream) {
    /** Calls `visit` with each plain file. Raises ModelException where the archive is damaged. */
    fun forEachFile(visit: (path: String, content: InputStream) -> Unit) {
        val block = ByteArray(BLOCK)
        var longName: String? = null
        while (true) {
            val got = stream.readFully(block)
            if (got == 0 || block.all { it == ZERO }) return
            if (got < BLOCK || !isHeader(block)) throw ModelException("the tar archive is damaged: a header is none")
            val size = number(block, 124, 12)
            val content = Content(size)
            when (block[156].toInt().toChar()) {
                '0', '\u0000', '7' -> {
                    visit(longName ?: name(block), content)
                    longName = null
                }
                '5' -> longName = null
                'L' -> longName = text(content.take())
                'x' -> longName = paxPath(content.take()) ?: longName
                'g' -> Unit
                else -> throw ModelException("the tar archive has ${longName ?: name(block)}, which is a link or a device")
            }
            content.skipRest()
        }
    }

    private fun name(block: ByteArray): String {
        val name = field(block, 0, 100)
        val prefix = if (field(block, 257, 5) == "ustar") field(block, 345, 155) else ""
        return if (prefix.isEmpty()) name else "$prefix/$name"
    }

    /** "LENGTH key=value\n" records; the one with the path. */
    private fun paxPath(raw: ByteArray): String? {
        var from = 0
        var path: String? = null
        while (from < raw.size) {
            val space = (from until raw.size).firstOrNull { raw[it] == ' '.code.toByte() } ?: break
            val length = String(raw, from, space - from, Charsets.US_ASCII).toIntOrNull() ?: 0
            if (length <= space - from + 1 || length > raw.size - from) throw ModelException("the tar archive is damaged: a pax record")
            val record = String(raw, space + 1, from + length - space - 2, Charsets.UTF_8)
            if (record.startsWith("path=")) path = record.removePrefix("path=")
            from += length
        }
        return path
    }

    /** A file's bytes in the archive's stream. */
    private inner class Content(private val size: Long) : InputStream() {
        private var left = size

        override fun read(): Int {
            val one = ByteArray(1)
            return if (read(one, 0, 1) < 0) -1 else one[0].toInt() and 0xff
        }

        override fun read(into: ByteArray, offset: Int, length: Int): Int {
            if (left == 0L) return -1
            val got = stream.read(into, offset, minOf(length.toLong(), left).toInt())
            if (got < 0) throw ModelException("the tar archive ends in the middle of a file")
            left -= got
            return got
        }

        fun take(): ByteArray {
            if (size > MAX_NAME) throw ModelException("the tar archive is damaged: a name of $size bytes")
            return ByteArray(size.toInt()).also { readFully(it) }
        }

        fun skipRest() {
            val buffer = ByteArray(1 shl 16)
            while (read(buffer, 0, buffer.size) >= 0) continue
            left = (BLOCK - size % BLOCK) % BLOCK
            while (read(buffer, 0, buffer.size) >= 0) continue
        }
    }

    companion object {
        const val BLOCK = 512
        private const val ZERO: Byte = 0
        private const val MAX_NAME = 1 shl 16
        private const val CHECKSUM = 148

        /** Whether the header's sum is right. */
        fun isHeader(block: ByteArray): Boolean {
            var sum = 0
            for (at in 0 until BLOCK) sum += if (at in CHECKSUM until CHECKSUM + 8) ' '.code else block[at].toInt() and 0xff
            val said = field(block, CHECKSUM, 8).trim()
            return said.isNotEmpty() && said.toIntOrNull(8) == sum
        }

        private fun number(block: ByteArray, offset: Int, length: Int): Long {
            // GNU's form for large files: the first bit set, then the number in binary.
            if (block[offset] < 0) {
                var value = 0L
                for (at in offset + length - 8 until offset + length) value = value shl 8 or (block[at].toLong() and 0xff)
                if (value < 0) throw ModelException("the tar archive is damaged: a size below 0")
                return value
            }
            val said = field(block, offset, length).trim()
            val value = if (said.isEmpty()) 0 else said.toLongOrNull(8)
            return value?.takeIf { it >= 0 } ?: throw ModelException("the tar archive is damaged: a size of $said")
        }

        private fun field(block: ByteArray, offset: Int, length: Int): String = text(block.copyOfRange(offset, offset + length))

        private fun text(raw: ByteArray): String {
            val end = raw.indexOf(ZERO).let { if (it < 0) raw.size else it }
            return String(raw, 0, end, Charsets.UTF_8)
        }
    }
}
