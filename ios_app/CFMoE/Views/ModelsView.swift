// Models: those that are here, import with checksums, deletion.
import CFMoEKit
import SwiftUI
import UniformTypeIdentifiers

struct ModelsView: View {
  @ObservedObject var models: Observed<ModelsViewModel>
  @State private var isChoosing = false
  @State private var toDelete: InstalledModel?

  /// A directory, or an archive as the importer reads them.
  private static let importable: [UTType] = [.folder, .zip, .gzip] + ["tar", "tgz"].compactMap { UTType(filenameExtension: $0) }

  var body: some View {
    List {
      if let line = models.error {
        NoticeView(line: line) { models.model.dismissError() }
      }
      if let progress = models.importing {
        ImportProgressView(progress: progress) { models.model.cancelImport() }
      }
      Section {
        ForEach(models.models) { model in
          ModelRow(model: model, isOpen: models.openID == model.id, isOpening: models.opening != nil) {
            Task { await models.model.open(model) }
          }
          .swipeActions {
            if !model.isBundled { Button("Delete", role: .destructive) { toDelete = model } }
          }
        }
        if models.models.isEmpty { Text("There is no model on this device yet.").foregroundColor(.secondary) }
      }
      if !models.problems.isEmpty {
        Section("Cannot be used") {
          ForEach(models.problems, id: \.self) { Text($0).font(.footnote) }
        }
      }
      Section {
        Button("Import a model") { isChoosing = true }.disabled(models.importing != nil)
      } footer: {
        Text("An artifact that cfmoe compile wrote, as a directory or as a zip, tar or tar.gz archive.")
      }
    }
    .fileImporter(isPresented: $isChoosing, allowedContentTypes: Self.importable) { result in
      switch result {
      case .success(let url):
        let file = ChosenFile(url)
        models.model.importModel(file.url) { file.giveBack() }
      case .failure(let error):
        models.model.fail(error)
      }
    }
    .confirmationDialog("Delete this model?", isPresented: isDeleting, titleVisibility: .visible, presenting: toDelete) { model in
      Button("Delete \(model.manifest.name)", role: .destructive) { Task { await models.model.delete(model) } }
    }
  }

  private var isDeleting: Binding<Bool> {
    Binding(get: { @MainActor in toDelete != nil }, set: { @MainActor in if !$0 { toDelete = nil } })
  }
}

private struct ModelRow: View {
  let model: InstalledModel
  let isOpen: Bool
  let isOpening: Bool
  let open: @MainActor () -> Void

  var body: some View {
    HStack {
      VStack(alignment: .leading, spacing: 2) {
        Text(model.manifest.name).font(.headline)
        Text("\(sizeText(model.manifest.totalBytes)) · \(model.manifest.moeLayers) layers · \(model.manifest.numExperts) experts each")
          .font(.footnote)
          .foregroundColor(.secondary)
        Text(model.isBundled ? "Came with the app" : "Imported").font(.caption).foregroundColor(.secondary)
      }
      Spacer()
      if isOpen {
        Image(systemName: "checkmark.circle.fill").foregroundColor(.accentColor).accessibilityLabel("Open")
      } else {
        Button("Open", action: open).buttonStyle(.bordered).disabled(isOpening).accessibilityLabel("Open \(model.manifest.name)")
      }
    }
  }
}

private struct ImportProgressView: View {
  let progress: ImportProgress
  let cancel: @MainActor () -> Void

  var body: some View {
    Section {
      VStack(alignment: .leading, spacing: 6) {
        Text("Copying \(progress.file)").font(.subheadline)
        ProgressView(value: progress.fraction)
        Text("\(sizeText(progress.bytesDone)) of \(sizeText(progress.bytesTotal))").font(.footnote).foregroundColor(.secondary)
        if let last = progress.verified.last {
          Text("\(last.file)\nSHA-256 \(last.sha256)").font(.caption.monospaced()).lineLimit(3)
        }
      }
      Button("Cancel", role: .cancel, action: cancel)
    }
  }
}
