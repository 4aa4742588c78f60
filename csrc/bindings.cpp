// commfuse._C: the host side of a communicator. The ops are registered by their launchers, under
// schemas that the Python package defines.
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/kernel_table.h"
#include "runtime/channel.h"
#include "runtime/communicator.h"
#include "runtime/huge_memory.h"
#include "runtime/segment.h"
#include "vocab_parallel_sample/sample.h"
#ifdef COMMFUSE_WITH_CUDA
#include "all_reduce/all_reduce_cuda.h"
#include "gpu/channel_end.h"
#include "matmul_all_reduce/matmul_all_reduce_cuda.h"
#include "runtime/gpu_links.h"
#include "vocab_parallel_sample/sample_cuda.h"
#endif

namespace py = pybind11;

namespace commfuse {
namespace {

py::object error_class(const char* name) {
  return py::module_::import("commfuse.errors").attr(name);
}

const char* class_of(Failure failure) {
  switch (failure) {
    case Failure::timeout:
      return "PeerTimeout";
    case Failure::mismatch:
      return "PeerMismatch";
    case Failure::died:
      return "PeerDied";
    default:
      return "CommunicatorClosed";
  }
}

// A view of shared memory that keeps its mapping alive.
at::Tensor workspace(const std::shared_ptr<Communicator>& communicator, int rank) {
  TORCH_CHECK_VALUE(rank >= 0 && rank < communicator->world(), "rank ", rank, " of ",
                    communicator->world());
  if (communicator->world() == 1) return at::zeros({0}, at::kByte);
  return at::from_blob(
      communicator->workspace(rank), {static_cast<int64_t>(communicator->workspace_bytes())},
      [communicator](void*) {}, at::kByte);
}

#ifdef COMMFUSE_WITH_CUDA
gpu::Attachment& attachment(const Communicator& communicator) {
  TORCH_CHECK_VALUE(communicator.gpu(), "the communicator has no memory on a GPU");
  return *communicator.gpu();
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const CommunicatorError& error) {
      py::set_error(error_class(class_of(error.failure)), error.what());
    } catch (const ConcurrentUseError& error) {
      py::set_error(error_class("ConcurrentUse"), error.what());
    } catch (const NoTokenError& error) {
      py::set_error(error_class("CommfuseError"), error.what());
    }
  });

  m.def("cpu_isa", [] { return std::string(kernels().name); });
  // uint8 [bytes] where packed weights would lie: what read_memory should be timed on.
  m.def("huge_empty", [](int64_t bytes) { return huge_empty(bytes, at::kByte); });
  m.def("read_memory", [](const at::Tensor& x) {
    const py::gil_scoped_release unlocked;
    return kernels().read_memory(x.const_data_ptr(), x.nbytes());
  });
  m.def("now_ns", &now_ns);
  m.attr("panel_columns") = kPanelColumns;
  // For the shape of an op's output, where only the handle is known.
  m.def("world_size", [](int64_t handle) { return Communicator::from_handle(handle).world(); });

#ifdef COMMFUSE_WITH_CUDA
  py::class_<GpuLink>(m, "GpuLink")
      .def_readonly("from_device", &GpuLink::from)
      .def_readonly("to_device", &GpuLink::to)
      .def_readonly("access", &GpuLink::access)
      .def_readonly("native_atomics", &GpuLink::native_atomics)
      .def_readonly("performance_rank", &GpuLink::performance_rank);
  m.def("gpu_links", &gpu_links);
  m.def("gpu_workspace_bytes", &gpu::workspace_bytes, py::arg("world"), py::arg("slot_bytes"));
  m.def("gpu_channel_bytes", &gpu::channel_bytes, py::arg("shape"));
#endif

  py::enum_<DType>(m, "DType")
      .value("bfloat16", DType::bfloat16)
      .value("float16", DType::float16)
      .value("float32", DType::float32);
  py::class_<ChannelShape>(m, "ChannelShape")
      .def(py::init<DType, int64_t, int64_t, int>(), py::arg("dtype"), py::arg("rows"),
           py::arg("columns"), py::arg("slots"))
      .def_readonly("columns", &ChannelShape::columns)
      .def_readonly("dtype", &ChannelShape::dtype)
      .def_property_readonly("memory_bytes", &ChannelShape::memory_bytes);
  // For the shape of what arrives, where only the handle is known.
  m.def("channel_shape", [](int64_t handle) { return Channel::from_handle(handle).shape(); });

  py::class_<SegmentServer>(m, "SegmentServer")
      .def_static(
          "for_channel",
          [](const ChannelShape& shape) {
            return SegmentServer(SegmentSize{2, 0, 0, shape.memory_bytes()});
          },
          py::arg("shape"))
      .def(py::init([](int world, uint64_t payload_bytes, uint64_t workspace_bytes) {
             return SegmentServer(SegmentSize{world, payload_bytes, workspace_bytes});
           }),
           py::arg("world"), py::arg("payload_bytes"), py::arg("workspace_bytes"))
      .def_property_readonly("address", &SegmentServer::address);

  py::class_<Statistics>(m, "Statistics")
      .def_readonly("calls", &Statistics::calls)
      .def_readonly("bytes_sent", &Statistics::bytes_sent)
      .def_readonly("communication_ns", &Statistics::communication_ns);

  py::class_<TraceEvent> event(m, "TraceEvent");
  py::enum_<TraceEvent::Kind>(event, "Kind")
      .value("computed", TraceEvent::Kind::computed)
      .value("published", TraceEvent::Kind::published)
      .value("arrived", TraceEvent::Kind::arrived)
      .value("reduced", TraceEvent::Kind::reduced);
  event.def_readonly("time_ns", &TraceEvent::time_ns)
      .def_readonly("kind", &TraceEvent::kind)
      .def_readonly("block", &TraceEvent::block);

  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<Communicator, std::shared_ptr<Communicator>> communicator(m, "Communicator");
  communicator.def(py::init<>())
      .def_static(
          "serve",
          [](SegmentServer& server, double timeout_s, double latency_ns, double bytes_per_ns) {
            return std::make_shared<Communicator>(Segment::serve(std::move(server)), 0, timeout_s,
                                                  LinkModel{latency_ns, bytes_per_ns});
          },
          py::arg("server"), py::arg("timeout_s"), py::arg("latency_ns"), py::arg("bytes_per_ns"),
          unlocked)
      .def_static(
          "connect",
          [](const std::string& address, int rank, double timeout_s, double latency_ns,
             double bytes_per_ns) {
            return std::make_shared<Communicator>(Segment::connect(address, rank), rank, timeout_s,
                                                  LinkModel{latency_ns, bytes_per_ns});
          },
          py::arg("address"), py::arg("rank"), py::arg("timeout_s"), py::arg("latency_ns"),
          py::arg("bytes_per_ns"), unlocked)
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("world_size", &Communicator::world)
      .def_property_readonly("handle", &Communicator::handle)
      .def_property_readonly("emulated", &Communicator::emulated)
      .def_property_readonly("payload_bytes",
                             [](const Communicator& c) { return c.payload_bytes(0); })
      .def_property_readonly("workspace_bytes", &Communicator::workspace_bytes)
      .def("workspace", &workspace, py::arg("rank"))
      .def_property_readonly("awaited", &Communicator::awaited)
      .def("check", &Communicator::check)
      .def("barrier", &Communicator::barrier, unlocked)
      .def("hand_over", &Communicator::hand_over, py::arg("bytes"), unlocked)
      .def("close", &Communicator::close, unlocked)
      .def("statistics", &Communicator::statistics)
      .def("reset_statistics", &Communicator::reset_statistics)
      .def("start_trace", &Communicator::start_trace)
      .def("stop_trace", &Communicator::stop_trace)
      .def("start_spans", &Communicator::start_spans)
      .def("stop_spans", &Communicator::stop_spans)
      .def("set_name", &Communicator::set_name, py::arg("name"))
      .def("set_publish_delay_us", &Communicator::set_publish_delay_us);
  py::class_<Channel, std::shared_ptr<Channel>> channel(m, "Channel");
  channel
      .def_static(
          "serve",
          [](std::shared_ptr<Communicator> communicator, SegmentServer& server, int source,
             int target, const ChannelShape& shape) {
            return std::make_shared<Channel>(
                std::move(communicator), Segment::serve(std::move(server)), source, target, shape);
          },
          py::arg("communicator"), py::arg("server"), py::arg("source"), py::arg("target"),
          py::arg("shape"), unlocked)
      .def_static(
          "connect",
          [](std::shared_ptr<Communicator> communicator, const std::string& address, int source,
             int target, const ChannelShape& shape) {
            return std::make_shared<Channel>(std::move(communicator), Segment::connect(address, 1),
                                             source, target, shape);
          },
          py::arg("communicator"), py::arg("address"), py::arg("source"), py::arg("target"),
          py::arg("shape"), unlocked)
      .def_property_readonly("handle", &Channel::handle);
#ifdef COMMFUSE_WITH_CUDA
  channel.def_static(
      "on_gpu",
      [](std::shared_ptr<Communicator> communicator, const std::vector<uint64_t>& addresses,
         int source, int target, const ChannelShape& shape) {
        attachment(*communicator);
        auto end =
            std::make_shared<gpu::ChannelEnd>(*communicator, addresses, source, target, shape);
        return std::make_shared<Channel>(std::move(communicator), std::move(end), source, target,
                                         shape);
      },
      py::arg("communicator"), py::arg("addresses"), py::arg("source"), py::arg("target"),
      py::arg("shape"));
  communicator
      .def(
          "attach_gpu",
          [](Communicator& c, int device, const std::vector<uint64_t>& addresses,
             int64_t slot_bytes, int max_blocks) {
            c.attach_gpu(
                std::make_shared<gpu::Attachment>(c, device, addresses, slot_bytes, max_blocks));
          },
          py::arg("device"), py::arg("addresses"), py::arg("slot_bytes"), py::arg("max_blocks"))
      .def("check_rows", [](const Communicator& c) { gpu::check_rows(attachment(c)); })
      .def("detach_gpu", [](Communicator& c) { c.attach_gpu(nullptr); })
      .def(
          "add_gpu_buffer",
          [](const Communicator& c, const std::vector<uint64_t>& addresses, int64_t bytes) {
            attachment(c).add_buffer(addresses, bytes);
          },
          py::arg("addresses"), py::arg("bytes"))
      .def(
          "set_all_reduce_thresholds",
          [](const Communicator& c, int64_t one_shot_bytes, int64_t lines_bytes) {
            attachment(c).thresholds = {one_shot_bytes, lines_bytes};
          },
          py::arg("one_shot_bytes"), py::arg("lines_bytes"))
      .def(
          "all_reduce_algorithm",
          [](const Communicator& c, int64_t bytes) {
            switch (gpu::all_reduce_algorithm(attachment(c), bytes)) {
              case gpu::AllReduce::one_shot:
                return "one_shot";
              case gpu::AllReduce::two_shot:
                return "two_shot";
              case gpu::AllReduce::bulk:
                break;
            }
            return "bulk";
          },
          py::arg("bytes"))
      .def(
          "sends_tiles",
          [](const Communicator& c, bool is_float32, int64_t m, int64_t n) {
            return gpu::sends_tiles(attachment(c), is_float32 ? DType::float32 : DType::bfloat16, m,
                                    n);
          },
          py::arg("is_float32"), py::arg("m"), py::arg("n"))
      .def(
          "set_fused_rows",
          [](const Communicator& c, int64_t fewest, int64_t most) {
            attachment(c).fused_rows = {fewest, most};
          },
          py::arg("fewest"), py::arg("most"))
      .def(
          "set_claimed_percent",
          [](const Communicator& c, int percent) { attachment(c).claimed_percent = percent; },
          py::arg("percent"));
#endif
}

}  // namespace commfuse
