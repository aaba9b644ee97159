// Does the same as spill_stream.c in C++, where destructors close the region and end the pins.
#include <nodedb_mem.h>

#include <cstdint>
#include <exception>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr std::int64_t sensor_engine = 3;

struct Destroy {
    void operator()(ndm_region *region) const { ndm_region_destroy(region); }
};
struct Unpin {
    void operator()(const std::uint8_t *data) const { ndm_region_unpin(data); }
};
using Region = std::unique_ptr<ndm_region, Destroy>;
using Pin = std::unique_ptr<const std::uint8_t, Unpin>;

std::int64_t checked(std::int64_t status)
{
    if (status < 0)
        throw std::runtime_error(ndm_last_error()->message);
    return status;
}

Region open(const char *path)
{
    ndm_options options{};
    options.initial_capacity = 1 << 16;
    options.max_capacity = 1 << 30;
    options.alignment = 64;
    options.cache_limit = UINT64_MAX;
    Region region(ndm_region_open(path, &options));
    if (!region)
        throw std::runtime_error(std::string(path) + ": " + ndm_last_error()->message);
    return region;
}

std::vector<std::uint8_t> make_record(std::uint64_t number)
{
    std::uint64_t state = (number + 1) * 0x9E3779B97F4A7C15u;
    std::vector<std::uint8_t> record(number * 37 % 5000);
    for (auto &byte : record) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        byte = static_cast<std::uint8_t>(state);
    }
    return record;
}

std::uint32_t crc32(const std::uint8_t *data, std::uint64_t size)
{
    std::uint32_t crc = UINT32_MAX;
    for (std::uint64_t i = 0; i < size; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0u);
    }
    return ~crc;
}

} // namespace

int main(int argc, char **argv)
try {
    if (argc != 3)
        throw std::invalid_argument("usage: spill_stream PATH COUNT");
    checked(NDM_CHECK_ABI());
    const Region region = open(argv[1]);
    const std::uint64_t count = std::stoull(argv[2]);
    for (std::uint64_t number = 0; number < count; number++) {
        const auto record = make_record(number);
        const std::int64_t slot = checked(ndm_region_write(region.get(), record.data(), record.size(), sensor_engine));
        ndm_slot where{};
        checked(ndm_region_slot(region.get(), slot, &where));
        std::uint64_t size = 0; // the line describes what the region holds, seen in place
        const Pin stored(ndm_region_pin(region.get(), slot, &size));
        std::cout << slot << ' ' << where.offset << ' ' << size << ' ' << crc32(stored.get(), size) << std::endl;
    }
    while (std::cin.get() != std::char_traits<char>::eof())
        ;
    return 0;
} catch (const std::exception &error) {
    std::cerr << "spill_stream: " << error.what() << '\n';
    return 1;
}
