// The app by Google's tools. -Pcfmoe.jniLibs=DIR brings the engine, -Pcfmoe.assets=DIR a model: cfmoe package gives both.
import org.jetbrains.kotlin.gradle.dsl.JvmTarget

plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

fun setting(name: String): String = providers.gradleProperty("cfmoe.$name").get()

val keystore = providers.gradleProperty("cfmoe.keystore").orNull
val keystorePassword = providers.environmentVariable("CFMOE_KEYSTORE_PASSWORD").orNull
val keyAlias = providers.environmentVariable("CFMOE_KEY_ALIAS").orNull

android {
    namespace = "org.cfmoe.app"
    compileSdk = setting("targetSdk").toInt()

    defaultConfig {
        applicationId = setting("applicationId")
        versionName = setting("versionName")
        versionCode = setting("versionCode").toInt()
        minSdk = setting("minSdk").toInt()
        targetSdk = setting("targetSdk").toInt()
    }

    sourceSets["main"].apply {
        providers.gradleProperty("cfmoe.jniLibs").orNull?.let { jniLibs.srcDir(it) }
        providers.gradleProperty("cfmoe.assets").orNull?.let { assets.srcDir(it) }
    }

    signingConfigs {
        if (keystore != null) {
            create("own") {
                storeFile = file(keystore)
                storePassword = keystorePassword
                keyPassword = keystorePassword
                this.keyAlias = keyAlias
            }
        }
    }

    buildTypes {
        release {
            isMinifyEnabled = true
            proguardFiles("proguard-rules.pro")
            signingConfig = signingConfigs.getByName(if (keystore != null) "own" else "debug")
        }
    }

    packaging {
        jniLibs {
            useLegacyPackaging = true // unpacked on the phone: the engine is a program
            keepDebugSymbols += "**/libcfmoe-engine.so" // a program, and stripped already
        }
    }

    androidResources {
        noCompress += "bin"
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_11
        targetCompatibility = JavaVersion.VERSION_11
    }
}

kotlin {
    compilerOptions {
        jvmTarget = JvmTarget.JVM_11
    }
}

dependencies {
    testImplementation("junit:junit:4.13.2")
    testImplementation("org.json:json:20250517")
}
