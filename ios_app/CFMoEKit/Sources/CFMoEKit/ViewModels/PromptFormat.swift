// How a chat message is written for a model: the formats of the usual families, known by the special tokens in the artifact's chat
// template.
import Foundation

public enum PromptFormat: String, Equatable, Sendable {
  /// The text as it is; the model continues it.
  case plain
  case chatML
  case llama3
  case mistral

  /// What the artifact's chat template is; `plain` where it has none or one that is not known here.
  public static func of(artifact: URL) -> PromptFormat {
    if let file = try? Data(contentsOf: artifact.appendingPathComponent("chat_template.jinja")) {
      return of(template: String(decoding: file, as: UTF8.self))
    }
    guard let config = try? Data(contentsOf: artifact.appendingPathComponent("tokenizer_config.json")) else { return .plain }
    return of(template: (try? Fields(config, source: "tokenizer_config.json").text("chat_template")) ?? "")
  }

  static func of(template: String) -> PromptFormat {
    if template.contains("<|im_start|>") { return .chatML }
    if template.contains("<|start_header_id|>") { return .llama3 }
    if template.contains("[INST]") { return .mistral }
    return .plain
  }

  /// The tokens' text for the user's message. isFirst: nothing was said before. The model's end token is not in its cache, so later
  /// messages begin with it.
  func turn(_ message: String, isFirst: Bool) -> String {
    switch self {
    case .plain: return message
    case .chatML: return (isFirst ? "" : "<|im_end|>\n") + "<|im_start|>user\n\(message)<|im_end|>\n<|im_start|>assistant\n"
    case .llama3:
      let head = "<|start_header_id|>user<|end_header_id|>\n\n\(message)<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
      return (isFirst ? "<|begin_of_text|>" : "<|eot_id|>") + head
    case .mistral: return (isFirst ? "<s>" : "</s>") + "[INST] \(message) [/INST]"
    }
  }
}
