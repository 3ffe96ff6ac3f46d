// Lets SwiftUI observe a view model of CFMoEKit, which knows nothing of SwiftUI.
import CFMoEKit
import SwiftUI

@MainActor
@dynamicMemberLookup
final class Observed<Model: StatefulModel>: ObservableObject {
  let model: Model
  @Published private(set) var state: Model.State

  init(_ model: Model) {
    self.model = model
    state = model.state
    model.onChange = { [weak self] in
      guard let self else { return }
      self.state = self.model.state
    }
  }

  subscript<Value>(dynamicMember path: KeyPath<Model.State, Value>) -> Value { state[keyPath: path] }
}
