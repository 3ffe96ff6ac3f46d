// The benchmark: measures the open model at three budgets and exports the figures as JSON.
import CFMoEKit
import SwiftUI
import UniformTypeIdentifiers

struct BenchmarkView: View {
  @ObservedObject var benchmark: Observed<BenchmarkViewModel>
  @ObservedObject var host: Observed<EngineHost>
  @State private var exported: JSONDocument?

  private let plan = BenchmarkViewModel.Plan()

  var body: some View {
    List {
      if let line = benchmark.error {
        NoticeView(line: line) { benchmark.model.dismissError() }
      }
      Section {
        if benchmark.isRunning {
          ProgressView(value: Double(benchmark.done), total: Double(max(benchmark.total, 1)))
          Text("\(benchmark.done) of \(benchmark.total) runs are done.").font(.footnote)
          Button("Cancel", role: .cancel) { benchmark.model.cancel() }
        } else {
          Button("Measure") { benchmark.model.run(plan) }.disabled(host.model.loaded == nil)
        }
      } footer: {
        Text("Reads \(plan.promptTokens) tokens and writes \(plan.newTokens) at three memory budgets.")
      }
      if let report = benchmark.report, !report.results.isEmpty {
        Section(report.model) {
          ForEach(report.results) { ResultRow(result: $0) }
        }
        if !benchmark.isRunning {
          Button("Export JSON") { export(report) }
        }
      }
    }
    .fileExporter(isPresented: isExporting, document: exported, contentType: .json, defaultFilename: "cfmoe-benchmark") { result in
      if case .failure(let error) = result { benchmark.model.fail(error) }
    }
  }

  private func export(_ report: BenchmarkReport) {
    do {
      exported = JSONDocument(try report.json())
    } catch {
      benchmark.model.fail(error)
    }
  }

  private var isExporting: Binding<Bool> {
    Binding(get: { @MainActor in exported != nil }, set: { @MainActor in if !$0 { exported = nil } })
  }
}

private struct ResultRow: View {
  let result: BenchmarkResult

  var body: some View {
    VStack(alignment: .leading, spacing: 2) {
      Text("\(result.memoryBudget) of the experts, \(sizeText(result.memory.budgetBytes))").font(.headline)
      Text("Reads \(speedText(result.metrics.prefill.tokensPerSecond)), writes \(speedText(result.metrics.decode.tokensPerSecond))")
      Text("\(shareText(result.metrics.decode.hitRate)) hits, \(sizeText(result.metrics.decode.bytesPerToken)) from flash per token")
        .foregroundColor(.secondary)
    }
    .font(.footnote)
  }
}

/// What the system's exporter writes.
struct JSONDocument: FileDocument {
  static let readableContentTypes: [UTType] = [.json]
  let data: Data

  init(_ data: Data) { self.data = data }

  init(configuration: ReadConfiguration) throws { data = configuration.file.regularFileContents ?? Data() }

  func fileWrapper(configuration: WriteConfiguration) throws -> FileWrapper { FileWrapper(regularFileWithContents: data) }
}
