// What view models have in common: one state that is written in one place, and a call after each change.
import Foundation

/// What a view needs of a view model, whichever it is.
@MainActor
public protocol StatefulModel: AnyObject {
  associatedtype State: Equatable & Sendable
  var state: State { get }
  var onChange: (@MainActor () -> Void)? { get set }
}

/// A view observes by `onChange`; there is one view, and this package knows nothing of it.
@MainActor
open class ViewModel<State: Equatable & Sendable>: StatefulModel {
  public private(set) var state: State
  public var onChange: (@MainActor () -> Void)?

  init(_ state: State) { self.state = state }

  func update(_ change: (inout State) -> Void) {
    var next = state
    change(&next)
    guard next != state else { return }
    state = next
    stateChanged()
  }

  func stateChanged() { onChange?() }
}

/// Bytes that the process may still take before the system ends it; nil where the system does not say.
public typealias AvailableMemory = @Sendable () -> UInt64?
