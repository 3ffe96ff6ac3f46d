/** Runs all tests and says how many there were, as one line of JSON; for machines without Gradle. */
package org.cfmoe.app

import kotlin.system.exitProcess
import org.cfmoe.app.chat.ChatFormatTest
import org.cfmoe.app.chat.ConversationTest
import org.cfmoe.app.engine.EngineProcessTest
import org.cfmoe.app.engine.WireTest
import org.cfmoe.app.models.ImporterTest
import org.cfmoe.app.state.ReducerTest
import org.json.JSONObject
import org.junit.internal.TextListener
import org.junit.runner.Description
import org.junit.runner.JUnitCore
import org.junit.runner.notification.Failure
import org.junit.runner.notification.RunListener

fun main() {
    val core = JUnitCore()
    var leftOut = 0
    core.addListener(TextListener(System.err))
    core.addListener(object : RunListener() {
        private var startedAt = 0L

        override fun testStarted(description: Description) {
            startedAt = System.nanoTime()
        }

        override fun testFinished(description: Description) {
            System.err.println(" ${description.displayName} ${(System.nanoTime() - startedAt) / 1_000_000} ms")
        }

        override fun testAssumptionFailure(failure: Failure) {
            leftOut += 1
        }
    })
    val result = core.run(
        WireTest::class.java,
        ReducerTest::class.java,
        ImporterTest::class.java,
        ChatFormatTest::class.java,
        EngineProcessTest::class.java,
        AppControllerTest::class.java,
        ConversationTest::class.java,
    )
    println(JSONObject().put("run", result.runCount).put("failed", result.failureCount).put("left_out", leftOut))
    exitProcess(if (result.wasSuccessful()) 0 else 1)
}
