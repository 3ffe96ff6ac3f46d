// Declarations of the part of Foundation that runtime_ext/src/device/metal uses, for a syntax check where there is no Apple SDK.
#pragma once
#include <TargetConditionals.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define nil nullptr
#define YES __objc_yes
#define NO __objc_no
typedef bool BOOL;
typedef unsigned long NSUInteger;
typedef long NSInteger;
typedef double CFTimeInterval;
#define NS_OPTIONS(type, name) enum name : type

__attribute__((objc_root_class)) @interface NSObject
+ (instancetype)alloc;
- (instancetype)init;
@end

typedef struct { NSUInteger location, length; } NSRange;
static inline NSRange NSMakeRange(NSUInteger location, NSUInteger length) { return (NSRange){location, length}; }

typedef struct {
  unsigned long state;
  __unsafe_unretained id _Nullable* _Nullable itemsPtr;
  unsigned long* _Nullable mutationsPtr;
  unsigned long extra[5];
} NSFastEnumerationState;

enum { NSUTF8StringEncoding = 4 };
@interface NSString : NSObject
- (instancetype)initWithBytes:(const void*)bytes length:(NSUInteger)length encoding:(NSUInteger)encoding;
+ (instancetype)stringWithUTF8String:(const char*)text;
- (const char*)UTF8String;
@end

@interface NSArray<__covariant ObjectType> : NSObject
+ (instancetype)arrayWithObjects:(const ObjectType _Nonnull[])objects count:(NSUInteger)count;
- (ObjectType)objectAtIndexedSubscript:(NSUInteger)index;
- (NSUInteger)countByEnumeratingWithState:(NSFastEnumerationState*)state
                                  objects:(id __unsafe_unretained _Nullable[])buffer
                                    count:(NSUInteger)length;
@end

@interface NSError : NSObject
@property(readonly) NSInteger code;
@property(readonly, copy) NSString* localizedDescription;
@end

@interface NSProcessInfo : NSObject
+ (NSProcessInfo*)processInfo;
@property(readonly) unsigned long long physicalMemory;
@property(readonly, copy) NSString* operatingSystemVersionString;
@end
