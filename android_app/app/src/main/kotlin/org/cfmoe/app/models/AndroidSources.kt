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
fun pickedArchive(resolver: ContentResolver, uri: Uri): ArtifactSource {
    val size = resolver.query(uri, arrayOf(OpenableColumns.SIZE), null, null, null)?.use { row ->
        if (row.moveToFirst() && !row.isNull(0)) row.getLong(0) else null
    }
    return ArchiveSource(size) { resolver.openInputStream(uri) ?: throw FileNotFoundException("the chosen file cannot be opened") }
}

/** A directory that was picked, with everything below it. */
class PickedDirectory(private val resolver: ContentResolver, private val tree: Uri) : ArtifactSource {
    override val totalBytes: Long by lazy {
        var total = 0L
        walk(DocumentsContract.getTreeDocumentId(tree), "") { _, _, size -> total += size }
        total
    }

    override fun forEachFile(visit: (path: String, content: InputStream) -> Unit) =
        walk(DocumentsContract.getTreeDocumentId(tree), "") { path, document, _ ->
            val stream = resolver.openInputStream(DocumentsContract.buildDocumentUriUsingTree(tree, document))
            (stream ?: throw FileNotFoundException("$path cannot be opened")).use { visit(path, it) }
        }

    private fun walk(directory: String, prefix: String, visit: (path: String, document: String, size: Long) -> Unit) {
        val children = DocumentsContract.buildChildDocumentsUriUsingTree(tree, directory)
        val columns = arrayOf(Document.COLUMN_DOCUMENT_ID, Document.COLUMN_DISPLAY_NAME, Document.COLUMN_MIME_TYPE, Document.COLUMN_SIZE)
        val rows = resolver.query(children, columns, null, null, null) ?: throw IOException("the chosen directory cannot be read")
        rows.use {
            while (rows.moveToNext()) {
                val path = prefix + rows.getString(1)
                when (rows.getString(2)) {
                    Document.MIME_TYPE_DIR -> walk(rows.getString(0), "$path/", visit)
                    else -> visit(path, rows.getString(0), rows.getLong(3))
                }
            }
        }
    }
}
