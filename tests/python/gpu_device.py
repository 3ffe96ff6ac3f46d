"""The first Vulkan device, for tests alone: buffers in host memory and one kernel at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import vulkan as vk

_HOST = vk.VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | vk.VK_MEMORY_PROPERTY_HOST_COHERENT_BIT


class DeviceBuffer:
    """A storage buffer; `array` is its mapped memory."""

    def __init__(self, device: VulkanDevice, array: np.ndarray) -> None:
        self.size = max(16, -(-array.nbytes // 16) * 16)
        info = vk.VkBufferCreateInfo(size=self.size, usage=vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT)
        self.handle = vk.vkCreateBuffer(device.device, info, None)
        needs = vk.vkGetBufferMemoryRequirements(device.device, self.handle)
        allocation = vk.VkMemoryAllocateInfo(allocationSize=needs.size, memoryTypeIndex=device.memory_type(needs.memoryTypeBits))
        memory = vk.vkAllocateMemory(device.device, allocation, None)
        vk.vkBindBufferMemory(device.device, self.handle, memory, 0)
        mapped = vk.vkMapMemory(device.device, memory, 0, self.size, 0)
        self.array = np.frombuffer(mapped, np.uint8, array.nbytes).view(array.dtype).reshape(array.shape)
        self.array[...] = array


# (buffer, offset in bytes)
Binding = tuple[DeviceBuffer, int]


class VulkanDevice:
    def __init__(self) -> None:
        application = vk.VkApplicationInfo(apiVersion=vk.VK_MAKE_VERSION(1, 3, 0))
        self.instance = vk.vkCreateInstance(vk.VkInstanceCreateInfo(pApplicationInfo=application), None)
        self.physical = vk.vkEnumeratePhysicalDevices(self.instance)[0]
        queue = vk.VkDeviceQueueCreateInfo(queueFamilyIndex=0, queueCount=1, pQueuePriorities=[1.0])
        v13 = vk.VkPhysicalDeviceVulkan13Features(shaderIntegerDotProduct=True)
        v12 = vk.VkPhysicalDeviceVulkan12Features(pNext=v13, shaderFloat16=True, storageBuffer8BitAccess=True)
        v11 = vk.VkPhysicalDeviceVulkan11Features(pNext=v12, storageBuffer16BitAccess=True)
        self.device = vk.vkCreateDevice(self.physical, vk.VkDeviceCreateInfo(pNext=v11, pQueueCreateInfos=[queue]), None)
        self.queue = vk.vkGetDeviceQueue(self.device, 0, 0)
        pool = vk.VkCommandPoolCreateInfo(queueFamilyIndex=0, flags=vk.VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT)
        self.commands = vk.vkCreateCommandPool(self.device, pool, None)
        self.name = vk.vkGetPhysicalDeviceProperties(self.physical).deviceName

    def memory_type(self, allowed: int) -> int:
        memory = vk.vkGetPhysicalDeviceMemoryProperties(self.physical)
        for i in range(memory.memoryTypeCount):
            if allowed >> i & 1 and memory.memoryTypes[i].propertyFlags & _HOST == _HOST:
                return i
        raise AssertionError("no memory that the host sees")

    def upload(self, array: np.ndarray) -> DeviceBuffer:
        return DeviceBuffer(self, np.ascontiguousarray(array))

    def kernel(self, code: bytes, entry: str, buffers: int, scalars: int, _local: Sequence[int] = ()) -> VulkanKernel:
        return VulkanKernel(self, code, entry, buffers, scalars)


class VulkanKernel:
    """A pipeline with `buffers` storage buffers and `scalars` int32 push constants."""

    def __init__(self, owner: VulkanDevice, code: bytes, entry: str, buffers: int, scalars: int) -> None:
        self.owner, self.buffers, self.scalars = owner, buffers, scalars
        device = owner.device
        module = vk.vkCreateShaderModule(device, vk.VkShaderModuleCreateInfo(codeSize=len(code), pCode=code), None)
        kind, stage = vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, vk.VK_SHADER_STAGE_COMPUTE_BIT
        bindings = [
            vk.VkDescriptorSetLayoutBinding(binding=i, descriptorType=kind, descriptorCount=1, stageFlags=stage) for i in range(buffers)
        ]
        layout = vk.vkCreateDescriptorSetLayout(device, vk.VkDescriptorSetLayoutCreateInfo(pBindings=bindings), None)
        ranges = [vk.VkPushConstantRange(stageFlags=stage, offset=0, size=4 * scalars)] if scalars else []
        info = vk.VkPipelineLayoutCreateInfo(pSetLayouts=[layout], pPushConstantRanges=ranges)
        self.layout = vk.vkCreatePipelineLayout(device, info, None)
        shader = vk.VkPipelineShaderStageCreateInfo(stage=stage, module=module, pName=entry)
        pipeline = vk.VkComputePipelineCreateInfo(stage=shader, layout=self.layout)
        self.pipeline = vk.vkCreateComputePipelines(device, None, 1, [pipeline], None)[0]
        sizes = [vk.VkDescriptorPoolSize(type=kind, descriptorCount=max(1, buffers))]
        pool = vk.vkCreateDescriptorPool(device, vk.VkDescriptorPoolCreateInfo(maxSets=1, pPoolSizes=sizes), None)
        self.set = vk.vkAllocateDescriptorSets(device, vk.VkDescriptorSetAllocateInfo(descriptorPool=pool, pSetLayouts=[layout]))[0]
        allocate = vk.VkCommandBufferAllocateInfo(
            commandPool=owner.commands, level=vk.VK_COMMAND_BUFFER_LEVEL_PRIMARY, commandBufferCount=1
        )
        self.command = vk.vkAllocateCommandBuffers(device, allocate)[0]

    def __call__(self, bindings: Sequence[Binding], scalars: Sequence[int], grid: Sequence[int]) -> None:
        """Runs the kernel and waits for it."""
        assert len(bindings) == self.buffers and len(scalars) == self.scalars
        writes: list[Any] = []
        for i, (buffer, offset) in enumerate(bindings):
            info = vk.VkDescriptorBufferInfo(buffer=buffer.handle, offset=offset, range=buffer.size - offset)
            writes.append(
                vk.VkWriteDescriptorSet(
                    dstSet=self.set,
                    dstBinding=i,
                    descriptorCount=1,
                    descriptorType=vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
                    pBufferInfo=[info],
                )
            )
        vk.vkUpdateDescriptorSets(self.owner.device, len(writes), writes, 0, None)
        vk.vkBeginCommandBuffer(self.command, vk.VkCommandBufferBeginInfo())
        vk.vkCmdBindPipeline(self.command, vk.VK_PIPELINE_BIND_POINT_COMPUTE, self.pipeline)
        vk.vkCmdBindDescriptorSets(self.command, vk.VK_PIPELINE_BIND_POINT_COMPUTE, self.layout, 0, 1, [self.set], 0, None)
        if scalars:
            values = vk.ffi.new("int32_t[]", list(scalars))
            vk.vkCmdPushConstants(self.command, self.layout, vk.VK_SHADER_STAGE_COMPUTE_BIT, 0, 4 * len(scalars), values)
        vk.vkCmdDispatch(self.command, *grid)
        vk.vkEndCommandBuffer(self.command)
        vk.vkQueueSubmit(self.owner.queue, 1, [vk.VkSubmitInfo(pCommandBuffers=[self.command])], None)
        vk.vkQueueWaitIdle(self.owner.queue)
