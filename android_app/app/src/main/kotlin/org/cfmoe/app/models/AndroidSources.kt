/** Models inside the APK, and models that a person picks in the system's file picker. */
package org.cfmoe.app.models

import android.content.ContentResolver
import android.content.res.AssetManager
import android.net.Uri
import android.provider.DocumentsContract
import android.provider.DocumentsContract.Document
import android.provider.OpenableColumns
import java.io.FileNotFoundException
import java.io.IOException
import java.io.InputStream
import java.io.OutputStream
import org.cfmoe.app.BundledModel

private const val ASSETS = "models"

/** The artifacts below assets/models. Raises ModelException where one is damaged. */
fun bundledModels(assets: AssetManager): List<BundledModel> =
    try {
        assets.list(ASSETS).orEmpty().map { name ->
            val manifest = assets.open("$ASSETS/$name/${Manifest.FILE}").use { it.readBytes() }
            BundledModel(manifest, AssetSource(assets, "$ASSETS/$name", Manifest.parse(String(manifest, Charsets.UTF_8))))
        }
    } catch (error: IOException) {
        throw ModelException("the app's own model cannot be read: install the app again", error)
    }

private class AssetSource(
    private val assets: AssetManager,
    private val directory: String,
    private val manifest: Manifest,
) : ArtifactSource {
    override val totalBytes: Long = manifest.totalBytes

    override fun forEachFile(visit: (path: String, content: InputStream) -> Unit) {
        for (path in listOf(Manifest.FILE) + manifest.files.keys) {
            assets.open("$directory/$path", AssetManager.ACCESS_STREAMING).use { visit(path, it) }
        }
    }
}

/** An archive that was picked. */
class PickedArchive(private val resolver: ContentResolver, private val uri: Uri) : ArtifactSource {
    override val totalBytes: Long? by lazy {
        ofProvider {
            resolver.query(uri, arrayOf(OpenableColumns.SIZE), null, null, null)?.use { row ->
                if (row.moveToFirst() && !row.isNull(0)) row.getLong(0) else null
            }
        }
    }

    override fun forEachFile(visit: (path: String, content: InputStream) -> Unit) =
        ArchiveSource(totalBytes) { openPicked(resolver, uri) }.forEachFile(visit)
}

/** A directory that was picked, with everything below it. */
class PickedDirectory(private val resolver: ContentResolver, private val tree: Uri) : ArtifactSource {
    private class Found(val path: String, val document: String, val size: Long)

    private val files: List<Found> by lazy {
        ofProvider { ArrayList<Found>().also { list(DocumentsContract.getTreeDocumentId(tree), "", it) } }
    }

    override val totalBytes: Long
        get() = files.sumOf { it.size }

    override fun forEachFile(visit: (path: String, content: InputStream) -> Unit) {
        for (file in files) {
            openPicked(resolver, DocumentsContract.buildDocumentUriUsingTree(tree, file.document)).use { visit(file.path, it) }
        }
    }

    private fun list(directory: String, prefix: String, into: MutableList<Found>) {
        val children = DocumentsContract.buildChildDocumentsUriUsingTree(tree, directory)
        val columns = arrayOf(Document.COLUMN_DOCUMENT_ID, Document.COLUMN_DISPLAY_NAME, Document.COLUMN_MIME_TYPE, Document.COLUMN_SIZE)
        val rows = resolver.query(children, columns, null, null, null) ?: throw IOException("the chosen directory cannot be read")
        rows.use {
            while (rows.moveToNext()) {
                val path = prefix + rows.getString(1)
                when (rows.getString(2)) {
                    Document.MIME_TYPE_DIR -> list(rows.getString(0), "$path/", into)
                    else -> into += Found(path, rows.getString(0), rows.getLong(3))
                }
                if (into.size > MOST_FILES) throw IOException("more than $MOST_FILES files: choose the artifact's own directory")
            }
        }
    }

    private companion object {
        const val MOST_FILES = 10_000
    }
}

private fun openPicked(resolver: ContentResolver, uri: Uri): InputStream =
    ofProvider { resolver.openInputStream(uri) } ?: throw FileNotFoundException("the chosen file cannot be opened")

/** A file that was named in the picker, emptied for writing. Raises IOException. */
fun createPicked(resolver: ContentResolver, uri: Uri): OutputStream =
    ofProvider { resolver.openOutputStream(uri, "wt") } ?: throw FileNotFoundException("the chosen file cannot be written")

/** The app behind a file may be gone, or take its permission back: for this app all that is trouble with a file. */
private inline fun <T> ofProvider(ask: () -> T): T =
    try {
        ask()
    } catch (error: SecurityException) {
        throw IOException("the permission for the chosen file is gone", error)
    } catch (error: IllegalArgumentException) {
        throw IOException("the chosen file is gone", error)
    } catch (error: UnsupportedOperationException) {
        throw IOException("the app that has the chosen file cannot do this", error)
    }
