// The part of SwiftUI that the app uses, declared so that the compiler on Linux can check every call's types. Declarations only: nothing
// here draws.
@_exported import Foundation
import UIKit
import UniformTypeIdentifiers

private func declared() -> Never { fatalError("a declaration only") }

// Data flow

public protocol ObservableObject: AnyObject {}

@propertyWrapper public struct Published<Value> {
  public init(wrappedValue: Value) { self.wrappedValue = wrappedValue }
  public var wrappedValue: Value
}

@MainActor @preconcurrency public protocol DynamicProperty {}

@propertyWrapper public struct State<Value>: DynamicProperty {
  public init(wrappedValue: Value) {}
  public init() where Value: ExpressibleByNilLiteral {}
  public var wrappedValue: Value {
    get { declared() }
    nonmutating set {}
  }
  public var projectedValue: Binding<Value> { declared() }
}

@propertyWrapper @dynamicMemberLookup public struct Binding<Value> {
  @preconcurrency public init(get: @escaping @isolated(any) @Sendable () -> Value, set: @escaping @isolated(any) @Sendable (Value) -> Void)
  {}
  public var wrappedValue: Value {
    get { declared() }
    nonmutating set {}
  }
  public var projectedValue: Binding<Value> { self }
  public subscript<Subject>(dynamicMember keyPath: WritableKeyPath<Value, Subject>) -> Binding<Subject> { declared() }
}

@propertyWrapper @MainActor @preconcurrency public struct ObservedObject<ObjectType: ObservableObject>: DynamicProperty {
  public init(wrappedValue: ObjectType) { self.wrappedValue = wrappedValue }
  public var wrappedValue: ObjectType
}

@propertyWrapper @MainActor @preconcurrency public struct StateObject<ObjectType: ObservableObject>: DynamicProperty {
  public init(wrappedValue thunk: @autoclosure @escaping () -> ObjectType) {}
  public var wrappedValue: ObjectType { declared() }
}

// Views

@MainActor @preconcurrency public protocol View {
  associatedtype Body: View
  @ViewBuilder @MainActor @preconcurrency var body: Body { get }
}

extension Never: View { public var body: Never { declared() } }
public protocol Primitive: View where Body == Never {}
extension Primitive { public var body: Never { declared() } }

@resultBuilder public struct ViewBuilder {
  public static func buildExpression<Content: View>(_ content: Content) -> Content { content }
  public static func buildBlock() -> EmptyView { EmptyView() }
  public static func buildBlock<Content: View>(_ content: Content) -> Content { content }
  public static func buildBlock<each Content: View>(_ content: repeat each Content) -> TupleView<(repeat each Content)> { TupleView() }
  public static func buildIf<Content: View>(_ content: Content?) -> Content? { content }
  public static func buildEither<First: View, Second: View>(first: First) -> ConditionalContent<First, Second> { ConditionalContent() }
  public static func buildEither<First: View, Second: View>(second: Second) -> ConditionalContent<First, Second> { ConditionalContent() }
}

public struct EmptyView: Primitive { nonisolated public init() {} }
public struct TupleView<Content>: Primitive { nonisolated init() {} }
public struct ConditionalContent<First: View, Second: View>: Primitive { nonisolated init() {} }
extension Optional: View where Wrapped: View { public var body: Never { declared() } }

public struct Text: Primitive, Equatable {
  public init(_ key: LocalizedStringKey) {}
  @_disfavoredOverload public init<Content: StringProtocol>(_ content: Content) {}
}
public struct LocalizedStringKey: ExpressibleByStringInterpolation, Equatable { public init(stringLiteral value: String) {} }
public struct Image: Primitive { public init(systemName: String) {} }
public struct Label<Title: View, Icon: View>: Primitive {}
extension Label where Title == Text, Icon == Image { public init(_ key: LocalizedStringKey, systemImage: String) {} }
public struct Spacer: Primitive { public init(minLength: CGFloat? = nil) {} }

public struct HorizontalAlignment: Sendable { public static let leading = Self(), center = Self(), trailing = Self() }
public struct VerticalAlignment: Sendable { public static let top = Self(), center = Self(), bottom = Self() }
public struct Alignment: Sendable { public static let leading = Self(), trailing = Self(), center = Self() }
public struct UnitPoint: Sendable { public static let top = Self(), bottom = Self(), center = Self() }

public struct HStack<Content: View>: Primitive {
  public init(alignment: VerticalAlignment = .center, spacing: CGFloat? = nil, @ViewBuilder content: () -> Content) {}
}
public struct VStack<Content: View>: Primitive {
  public init(alignment: HorizontalAlignment = .center, spacing: CGFloat? = nil, @ViewBuilder content: () -> Content) {}
}
public struct LazyVStack<Content: View>: Primitive {
  public init(alignment: HorizontalAlignment = .center, spacing: CGFloat? = nil, @ViewBuilder content: () -> Content) {}
}
public struct ScrollView<Content: View>: Primitive { public init(@ViewBuilder content: () -> Content) {} }
public struct ScrollViewProxy {
  public func scrollTo<ID: Hashable>(_ id: ID, anchor: UnitPoint? = nil) {}
}
public struct ScrollViewReader<Content: View>: Primitive { public init(@ViewBuilder content: @escaping (ScrollViewProxy) -> Content) {} }
public struct List<SelectionValue: Hashable, Content: View>: Primitive {}
extension List where SelectionValue == Never { public init(@ViewBuilder content: () -> Content) {} }
public struct Section<Parent, Content, Footer> {}
extension Section: View where Parent: View, Content: View, Footer: View { public var body: Never { declared() } }
extension Section where Parent == Text, Content: View, Footer == EmptyView {
  public init(_ key: LocalizedStringKey, @ViewBuilder content: () -> Content) {}
  @_disfavoredOverload public init<Title: StringProtocol>(_ title: Title, @ViewBuilder content: () -> Content) {}
}
extension Section where Parent == EmptyView, Content: View, Footer == EmptyView { public init(@ViewBuilder content: () -> Content) {} }
extension Section where Parent == EmptyView, Content: View, Footer: View {
  public init(@ViewBuilder content: () -> Content, @ViewBuilder footer: () -> Footer) {}
}
public struct ForEach<Data: RandomAccessCollection, ID: Hashable, Content> {}
extension ForEach: View where Content: View { public var body: Never { declared() } }
extension ForEach where ID == Data.Element.ID, Content: View, Data.Element: Identifiable {
  public init(_ data: Data, @ViewBuilder content: @escaping (Data.Element) -> Content) {}
}
extension ForEach where Content: View {
  public init(_ data: Data, id: KeyPath<Data.Element, ID>, @ViewBuilder content: @escaping (Data.Element) -> Content) {}
}
public struct TabView<SelectionValue: Hashable, Content: View>: Primitive {}
extension TabView where SelectionValue == Int { public init(@ViewBuilder content: () -> Content) {} }
public struct NavigationView<Content: View>: Primitive { public init(@ViewBuilder content: () -> Content) {} }

// Controls

public struct ButtonRole: Equatable, Sendable { public static let cancel = Self(), destructive = Self() }
public struct Button<Label: View>: Primitive {
  @preconcurrency public init(action: @escaping @MainActor () -> Void, @ViewBuilder label: () -> Label) {}
}
extension Button where Label == Text {
  @preconcurrency public init(_ key: LocalizedStringKey, action: @escaping @MainActor () -> Void) {}
  @preconcurrency public init(_ key: LocalizedStringKey, role: ButtonRole?, action: @escaping @MainActor () -> Void) {}
}
public struct TextField<Label: View>: Primitive {}
extension TextField where Label == Text {
  public init(_ key: LocalizedStringKey, text: Binding<String>) {}
  @_disfavoredOverload public init<Title: StringProtocol>(_ title: Title, text: Binding<String>) {}
}
public struct TextEditor: Primitive { public init(text: Binding<String>) {} }
public struct Toggle<Label: View>: Primitive {}
extension Toggle where Label == Text { public init(_ key: LocalizedStringKey, isOn: Binding<Bool>) {} }
public struct ProgressView<Label: View, CurrentValueLabel: View>: Primitive {}
extension ProgressView where Label == EmptyView, CurrentValueLabel == EmptyView {
  public init<Value: BinaryFloatingPoint>(value: Value?, total: Value = 1.0) {}
}
public struct Slider<Label: View, ValueLabel: View>: Primitive {
  public init<Value: BinaryFloatingPoint>(
    value: Binding<Value>, in bounds: ClosedRange<Value> = 0...1, @ViewBuilder label: () -> Label,
    @ViewBuilder minimumValueLabel: () -> ValueLabel,
    @ViewBuilder maximumValueLabel: () -> ValueLabel, onEditingChanged: @escaping (Bool) -> Void = { _ in }
  ) where Value.Stride: BinaryFloatingPoint {}
}
public struct Picker<Label: View, SelectionValue: Hashable, Content: View>: Primitive {}
extension Picker where Label == Text {
  public init(_ key: LocalizedStringKey, selection: Binding<SelectionValue>, @ViewBuilder content: () -> Content) {}
}

// Gestures

@MainActor @preconcurrency public protocol Gesture { associatedtype Value }
public struct DragGesture: Gesture {
  public struct Value: Equatable, Sendable {}
  public init(minimumDistance: CGFloat = 10) {}
}
public struct ChangedGesture<Content: Gesture>: Gesture { public typealias Value = Content.Value }
extension Gesture where Value: Equatable {
  public func onChanged(_ action: @escaping (Value) -> Void) -> ChangedGesture<Self> { ChangedGesture() }
}

// Drawing

public protocol ShapeStyle {}
public struct Color: Primitive, Hashable, Sendable, ShapeStyle {
  nonisolated public init(red: Double, green: Double, blue: Double, opacity: Double = 1) {}
  public static let accentColor = Self(red: 0, green: 0, blue: 0), secondary = Self(red: 0, green: 0, blue: 0),
    orange = Self(red: 0, green: 0, blue: 0)
  nonisolated public func opacity(_ opacity: Double) -> Color { self }
}
public struct Path { public init(_ rect: CGRect) {} }
public struct GraphicsContext {
  public struct Shading { public static func color(_ color: Color) -> Shading { Shading() } }
  public func fill(_ path: Path, with shading: Shading) {}
}
public struct Canvas<Symbols: View>: Primitive {}
extension Canvas where Symbols == EmptyView {
  public init(opaque: Bool = false, renderer: @escaping (inout GraphicsContext, CGSize) -> Void) {}
}
public struct Font: Hashable, Sendable {
  public static let headline = Self(), subheadline = Self(), body = Self(), footnote = Self(), caption = Self()
  public func monospaced() -> Font { self }
  public func monospacedDigit() -> Font { self }
}

// Modifiers

public struct Edge {
  public struct Set: OptionSet, Sendable {
    public init(rawValue: Int) { self.rawValue = rawValue }
    public let rawValue: Int
    public static let all = Set(rawValue: 15), horizontal = Set(rawValue: 3), vertical = Set(rawValue: 12)
  }
}
public enum Visibility { case automatic, visible, hidden }
public protocol TextFieldStyle {}
public struct RoundedBorderTextFieldStyle: TextFieldStyle {}
extension TextFieldStyle where Self == RoundedBorderTextFieldStyle { public static var roundedBorder: Self { Self() } }
public protocol PrimitiveButtonStyle {}
public struct BorderedButtonStyle: PrimitiveButtonStyle {}
public struct BorderlessButtonStyle: PrimitiveButtonStyle {}
extension PrimitiveButtonStyle where Self == BorderedButtonStyle { public static var bordered: Self { Self() } }
extension PrimitiveButtonStyle where Self == BorderlessButtonStyle { public static var borderless: Self { Self() } }
public protocol NavigationViewStyle {}
public struct StackNavigationViewStyle: NavigationViewStyle {}
extension NavigationViewStyle where Self == StackNavigationViewStyle { public static var stack: Self { Self() } }
public protocol TextSelectability {}
public struct EnabledTextSelectability: TextSelectability {}
extension TextSelectability where Self == EnabledTextSelectability { public static var enabled: Self { Self() } }
public struct AccessibilityChildBehavior: Hashable, Sendable { public static let combine = Self(), contain = Self() }

extension View {
  public func padding(_ edges: Edge.Set = .all, _ length: CGFloat? = nil) -> some View { self }
  public func padding(_ length: CGFloat) -> some View { self }
  public func frame(width: CGFloat? = nil, height: CGFloat? = nil, alignment: Alignment = .center) -> some View { self }
  public func frame(
    minWidth: CGFloat? = nil, idealWidth: CGFloat? = nil, maxWidth: CGFloat? = nil, minHeight: CGFloat? = nil, idealHeight: CGFloat? = nil,
    maxHeight: CGFloat? = nil, alignment: Alignment = .center
  ) -> some View { self }
  public func font(_ font: Font?) -> some View { self }
  public func foregroundColor(_ color: Color?) -> some View { self }
  public func background<Style: ShapeStyle>(_ style: Style) -> some View { self }
  public func cornerRadius(_ radius: CGFloat) -> some View { self }
  public func lineLimit(_ number: Int?) -> some View { self }
  public func disabled(_ disabled: Bool) -> some View { self }
  public func id<ID: Hashable>(_ id: ID) -> some View { self }
  public func navigationTitle<Title: StringProtocol>(_ title: Title) -> some View { self }
  public func navigationViewStyle<Style: NavigationViewStyle>(_ style: Style) -> some View { self }
  public func tabItem<Content: View>(@ViewBuilder _ label: () -> Content) -> some View { self }
  public func textFieldStyle<Style: TextFieldStyle>(_ style: Style) -> some View { self }
  public func buttonStyle<Style: PrimitiveButtonStyle>(_ style: Style) -> some View { self }
  public func textSelection<Kind: TextSelectability>(_ kind: Kind) -> some View { self }
  public func onSubmit(_ action: @escaping () -> Void) -> some View { self }
  public func onAppear(perform action: (() -> Void)? = nil) -> some View { self }
  public func onDisappear(perform action: (() -> Void)? = nil) -> some View { self }
  public func onChange<Value: Equatable>(of value: Value, perform action: @escaping (Value) -> Void) -> some View { self }
  public func simultaneousGesture<Other: Gesture>(_ gesture: Other) -> some View { self }
  public func keyboardType(_ type: UIKeyboardType) -> some View { self }
  public func sheet<Content: View>(
    isPresented: Binding<Bool>, onDismiss: (() -> Void)? = nil, @ViewBuilder content: @escaping () -> Content
  ) -> some View { self }
  public func swipeActions<Content: View>(@ViewBuilder content: () -> Content) -> some View { self }
  public func accessibilityLabel(_ key: LocalizedStringKey) -> some View { self }
  public func accessibilityLabel(_ label: Text) -> some View { self }
  public func accessibilityValue<S: StringProtocol>(_ value: S) -> some View { self }
  public func accessibilityHidden(_ hidden: Bool) -> some View { self }
  public func accessibilityElement(children: AccessibilityChildBehavior) -> some View { self }
  public func toolbar<Content: ToolbarContent>(@ToolbarContentBuilder content: () -> Content) -> some View { self }
  public func confirmationDialog<Actions: View, Presented>(
    _ key: LocalizedStringKey, isPresented: Binding<Bool>, titleVisibility: Visibility = .automatic, presenting data: Presented?,
    @ViewBuilder actions: (Presented) -> Actions
  ) -> some View { self }
  public func fileImporter(
    isPresented: Binding<Bool>, allowedContentTypes: [UTType], onCompletion: @escaping (Result<URL, any Error>) -> Void
  ) -> some View { self }
  public func fileExporter<Document: FileDocument>(
    isPresented: Binding<Bool>, document: Document?, contentType: UTType, defaultFilename: String? = nil,
    onCompletion: @escaping (Result<URL, any Error>) -> Void
  ) -> some View { self }
}

public struct ToolbarItemPlacement: Sendable { public static let navigationBarTrailing = Self() }
@MainActor @preconcurrency public protocol ToolbarContent {}
public struct ToolbarItem<ID, Content: View>: ToolbarContent {}
extension ToolbarItem where ID == () { public init(placement: ToolbarItemPlacement, @ViewBuilder content: () -> Content) {} }
public struct ToolbarItemGroup<Content: View>: ToolbarContent {
  public init(placement: ToolbarItemPlacement, @ViewBuilder content: () -> Content) {}
}
@resultBuilder public struct ToolbarContentBuilder {
  public static func buildBlock<Content: ToolbarContent>(_ content: Content) -> Content { content }
}

// Documents

public struct FileDocumentReadConfiguration {
  public let contentType: UTType
  public let file: FileWrapper
}
public struct FileDocumentWriteConfiguration { public let contentType: UTType }
public protocol FileDocument {
  typealias ReadConfiguration = FileDocumentReadConfiguration
  typealias WriteConfiguration = FileDocumentWriteConfiguration
  static var readableContentTypes: [UTType] { get }
  init(configuration: ReadConfiguration) throws
  func fileWrapper(configuration: WriteConfiguration) throws -> FileWrapper
}

// The app

@MainActor @preconcurrency public protocol Scene {
  associatedtype Body: Scene
  @SceneBuilder @MainActor @preconcurrency var body: Body { get }
}
extension Never: Scene {}
@resultBuilder public struct SceneBuilder { public static func buildBlock<Content: Scene>(_ content: Content) -> Content { content } }
public struct WindowGroup<Content: View>: Scene {
  public init(@ViewBuilder content: @escaping () -> Content) {}
  public var body: Never { declared() }
}
@MainActor @preconcurrency public protocol App {
  associatedtype Body: Scene
  @SceneBuilder @MainActor @preconcurrency var body: Body { get }
  @MainActor @preconcurrency init()
}
extension App { @MainActor public static func main() {} }
