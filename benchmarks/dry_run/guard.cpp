// A device guard for CUDA that does nothing: builds of torch for CPUs have none, and moving a tensor to "cuda" asks for one.
#include <c10/core/impl/DeviceGuardImplInterface.h>

struct NoDevice : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return {c10::DeviceType::CUDA, 0}; }
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::DeviceType::CUDA, 0));
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, NoDevice);
