// What a thread that does I/O asks of the system.
#pragma once

namespace offload_opt {

// Called first by each thread of ours: signals belong to the program's own threads, and what wakes it is to get it to
// run soon.
void become_io_thread();

}  // namespace offload_opt
