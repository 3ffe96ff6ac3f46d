// The part of the module os that the app uses: declarations only.
public func os_proc_available_memory() -> Int { 0 }
