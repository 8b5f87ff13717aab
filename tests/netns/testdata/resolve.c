// SPDX-License-Identifier: Apache-2.0
/* resolve NAME: the addresses of a name, as this C library finds them. */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

int main(int argc, char **argv)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *found, *a;
	char text[INET6_ADDRSTRLEN];
	int err;

	if (argc != 2)
		return 2;
	err = getaddrinfo(argv[1], 0, &hints, &found);
	if (err) {
		fprintf(stderr, "%s: %s\n", argv[1], gai_strerror(err));
		return 1;
	}
	for (a = found; a; a = a->ai_next) {
		if (a->ai_family == AF_INET)
			inet_ntop(AF_INET, &((struct sockaddr_in *)a->ai_addr)->sin_addr, text, sizeof(text));
		else
			inet_ntop(AF_INET6, &((struct sockaddr_in6 *)a->ai_addr)->sin6_addr, text, sizeof(text));
		puts(text);
	}
	freeaddrinfo(found);
	return 0;
}
